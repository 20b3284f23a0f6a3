"""Optimisers and learning-rate schedules, one file per family.

ZeRO 1-3 shows an optimiser flat shards instead of the parameters. Each entry says what it needs of a parameter, and a pair that would
silently become another optimiser is refused when the configuration loads.
"""

from gentrain.training.optimizers.base import Averaging as Averaging
from gentrain.training.optimizers.base import Optimizer as Optimizer
from gentrain.training.optimizers.base import Partition as Partition
from gentrain.training.optimizers.base import decay_groups as decay_groups
from gentrain.training.optimizers.elementwise import SGD as SGD
from gentrain.training.optimizers.elementwise import AdamW as AdamW
from gentrain.training.optimizers.parameter_free import GlobalScalars as GlobalScalars
from gentrain.training.optimizers.schedules import Constant as Constant
from gentrain.training.optimizers.schedules import Cosine as Cosine
from gentrain.training.optimizers.schedules import Group as Group
from gentrain.training.optimizers.schedules import Schedule as Schedule
