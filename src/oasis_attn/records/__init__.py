"""Records of results: one versioned dataclass per kind, stored as JSON and read strictly.

A number is a `Metric`: its name (defined in the glossary, `oasis metrics`), the place it was
measured at, a sample count and, if it is a mean, a standard error.  A record adds what is needed to
reproduce the numbers: the model, the data, the settings, the seed and the environment.  Its file
has the keys of its kind's dataclass, `kind` and `version`, and no other.
"""

from oasis_attn.records.base import Metric, Record
from oasis_attn.records.environment import Environment, current_environment, processor
from oasis_attn.records.infos import BlocksInfo, ModelInfo, TextInfo, TrainingData, Try
from oasis_attn.records.kinds import (
    BenchmarkRecord,
    ConversionRecord,
    DiagnosisRecord,
    DoctorRecord,
    EvaluationRecord,
    ModelRecord,
    PrefixRecord,
    QuantizationRecord,
    TrainingRecord,
    TrialRecord,
)

__all__ = [
    "BenchmarkRecord",
    "BlocksInfo",
    "ConversionRecord",
    "DiagnosisRecord",
    "DoctorRecord",
    "Environment",
    "EvaluationRecord",
    "Metric",
    "ModelInfo",
    "ModelRecord",
    "PrefixRecord",
    "QuantizationRecord",
    "Record",
    "TextInfo",
    "TrainingData",
    "TrainingRecord",
    "TrialRecord",
    "Try",
    "current_environment",
    "processor",
]
