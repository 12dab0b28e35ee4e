"""What lm_eval's samples say of each document: its metrics, its passage, its arguments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# metric -> what makes a score of Σ value / Σ weight; every other metric is a mean.
FloatArray = npt.NDArray[np.float64]

TRANSFORMS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "perplexity": lambda ratio: np.exp(-ratio),
    "word_perplexity": lambda ratio: np.exp(-ratio),
    "byte_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}


# Fields of a document that hold what several questions may be about.
_CONTEXT_FIELDS = (
    "passage", "context", "article", "paragraph", "story",
    "flores_passage",  # Belebele
    "document_str",  # QA4MRE
    "Context",  # ArabicMMLU
    "narrative",  # MuSR
    "abstract",  # Qasper
    "background",  # EVALITA's admission tests
    "support",  # SciQ
    "scenario",  # ETHICS: virtue and deontology
    "premise",  # XNLI, ANLI and the like: several hypotheses on one
)  # fmt: skip


def document_metrics(sample: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(metric, value, weight) of one of lm_eval's samples: numbers, and for perplexities of sums (log-likelihood, words).

    Other pairs, such as (gold, prediction) of an F1 over all documents, are no values of one document.
    """
    for metric in sample["metrics"]:
        value = sample[metric]
        if isinstance(value, (bool, int, float, np.number)):
            yield metric, float(value), 1.0
        elif metric in TRANSFORMS and isinstance(value, (list, tuple)) and len(value) == 2:
            yield metric, float(value[0]), float(value[1])


def arguments_of(sample: Mapping[str, Any]) -> list[list[Any]]:
    """The arguments of each request of one of lm_eval's samples, which older versions wrote as lists."""
    found = sample["arguments"]
    each = found.values() if isinstance(found, dict) else found
    return [list(one.values()) if isinstance(one, dict) else one for one in each]


def shared_context(doc: Any) -> str | None:
    """A hash of the passage that a document asks about; other documents may ask about the same one."""
    if isinstance(doc, Mapping):
        for field in _CONTEXT_FIELDS:
            if isinstance(doc.get(field), str) and doc[field].strip():
                return hashlib.sha256(doc[field].encode("utf-8", "surrogatepass")).hexdigest()
    return None


def describe_documents(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of documents.parquet from lm_eval's samples: every metric of every document that is a number, or two."""
    return [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "metric": metric,
            "value": value,
            "weight": weight,
            "prompt_hash": sample["prompt_hash"],
            "context_hash": shared_context(sample["doc"]),
            "doc_hash": sample["doc_hash"],
        }
        for task, samples_of_task in samples.items()
        for sample in samples_of_task
        for metric, value, weight in document_metrics(sample)
    ]
