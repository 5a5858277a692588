"""How well a model does: its answers, its loss, its scores before and after training, and what it has forgotten."""

from qlora_helpers.evaluation.answers import answer, exact_match, exact_match_each, seconds_per_token, share_that_ends
from qlora_helpers.evaluation.batches import evaluating
from qlora_helpers.evaluation.comparison import Comparison, compare
from qlora_helpers.evaluation.facts import commonest_answer_rate, read_facts, recall, recall_each
from qlora_helpers.evaluation.knowledge import Kept, Knowledge, forgetting, measure_knowledge
from qlora_helpers.evaluation.losses import loss
from qlora_helpers.evaluation.scores import Scores, score
from qlora_helpers.statistics import standard_error

__all__ = [
    "Comparison",
    "Kept",
    "Knowledge",
    "Scores",
    "answer",
    "commonest_answer_rate",
    "compare",
    "evaluating",
    "exact_match",
    "exact_match_each",
    "forgetting",
    "loss",
    "measure_knowledge",
    "read_facts",
    "recall",
    "recall_each",
    "score",
    "seconds_per_token",
    "share_that_ends",
    "standard_error",
]
