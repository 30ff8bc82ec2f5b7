"""The data and base classes that the rooms share, and that extensions build on. No torch here."""

from rlgf_cli.protocols.data import Check, CheckStatus, ColumnMap, Example, Task
from rlgf_cli.protocols.guides import Answer, Completion, Failure, FinishReason, Guide, GuideAbilities, GuideRequest
from rlgf_cli.protocols.messages import Message, Prompt
from rlgf_cli.protocols.scorers import BoundedFigure, CorpusFigure, Metric, MetricResult, Reward, Score, Scorer

__all__ = [
    "Answer",
    "BoundedFigure",
    "Check",
    "CheckStatus",
    "ColumnMap",
    "Completion",
    "CorpusFigure",
    "Example",
    "Failure",
    "FinishReason",
    "Guide",
    "GuideAbilities",
    "GuideRequest",
    "Message",
    "Metric",
    "MetricResult",
    "Prompt",
    "Reward",
    "Score",
    "Scorer",
    "Task",
]
