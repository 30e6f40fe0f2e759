"""Which examples a step sees. Every class here satisfies `Data`, and reads only what the user names."""

from __future__ import annotations

from leantrain.data.cifar10 import Cifar10
from leantrain.data.csv_table import Csv
from leantrain.data.hf_dataset import HFDataset
from leantrain.data.idx import Idx
from leantrain.data.image_folder import ImageFolder
from leantrain.data.protocol import Batch, Data, Spec, Task
from leantrain.data.sklearn_sets import Sklearn
from leantrain.data.text import Text

__all__ = [
    "Batch", "Cifar10", "Csv", "Data", "HFDataset", "Idx", "ImageFolder", "Sklearn", "Spec", "Task", "Text",
]  # fmt: skip
