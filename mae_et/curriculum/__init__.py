"""The curriculum: what a model sees at each fraction of a budget of compute. Needs no torch."""

from mae_et.curriculum.cost import AreaCost, MAECost, MeasuredCost, TransformerShape
from mae_et.curriculum.curriculum import Curriculum
from mae_et.curriculum.making import Replay, auto_replay
from mae_et.curriculum.plan import Plan, PlannedStage, StepPlan
from mae_et.curriculum.schedule import LearningRate
from mae_et.curriculum.stage import Stage

__all__ = [
    "AreaCost",
    "Curriculum",
    "LearningRate",
    "MAECost",
    "MeasuredCost",
    "Plan",
    "PlannedStage",
    "Replay",
    "Stage",
    "StepPlan",
    "TransformerShape",
    "auto_replay",
]
