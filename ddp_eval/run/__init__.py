"""One evaluation from start to end, on the leader and on the other ranks. Read runner.py first."""
