"""Pure tensor functions: low-frequency views, HOG targets, patches."""

from .hog import hog_cells, hog_length, hog_targets
from .lowfreq import downsample, low_frequency_crop
from .patches import patchify, unpatchify

__all__ = ["downsample", "hog_cells", "hog_length", "hog_targets", "low_frequency_crop", "patchify", "unpatchify"]
