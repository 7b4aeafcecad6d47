"""From files to batches: examples, their contexts, both views of each, and the LightningDataModule."""

from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily

if TYPE_CHECKING:
    from opcd.data.anchors import Anchors
    from opcd.data.batch import Batch
    from opcd.data.contexts import ContextSource, context_hash, read_contexts
    from opcd.data.data_sets import DataSet, DataSets
    from opcd.data.datamodule import ContextQueryDataModule
    from opcd.data.example import Example, OnBadRow, parse_row, parse_rows
    from opcd.data.readers import ExampleSource, read_examples, read_rows
    from opcd.data.teacher_names import TeacherModels, check_same_vocabulary, nearest, teacher_key
    from opcd.data.views import Placement, Views

__all__ = [
    "Anchors",
    "Batch",
    "ContextQueryDataModule",
    "ContextSource",
    "DataSet",
    "DataSets",
    "Example",
    "ExampleSource",
    "OnBadRow",
    "Placement",
    "TeacherModels",
    "Views",
    "check_same_vocabulary",
    "context_hash",
    "nearest",
    "parse_row",
    "parse_rows",
    "read_contexts",
    "read_examples",
    "read_rows",
    "teacher_key",
]

__getattr__ = lazily(__name__)
