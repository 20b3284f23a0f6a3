"""Where the numbers, images and settings of a run are shown: one file per service."""

from gentrain.training.trackers.base import Tracked as Tracked
from gentrain.training.trackers.base import Tracker as Tracker
from gentrain.training.trackers.base import Tracking as Tracking
from gentrain.training.trackers.tensorboard import TENSORBOARD as TENSORBOARD
from gentrain.training.trackers.tensorboard import TensorBoard as TensorBoard
