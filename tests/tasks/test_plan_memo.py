"""A plan that was cut before, and when it must be cut again."""

from ddp_eval.tasks.plan_memo import PlanMemo


def test_only_what_is_the_same() -> None:
    """Catches the plan of other requests, of another model's costs, or of rows where packs are asked for."""
    memo, requests, others = PlanMemo(), ["a"], ["a"]
    cut: list[int] = []

    def make() -> int:
        cut.append(1)
        return len(cut)

    asks = [
        ("packs", requests, (1,)),
        ("packs", requests, (1,)),
        ("packs", requests, (2,)),
        ("rows", requests, (2,)),
        ("rows", others, (2,)),
    ]
    assert [memo.get(*ask, make) for ask in asks] == [1, 1, 2, 3, 4]
    memo.forget()
    assert memo.get("rows", others, (2,), make) == 5
