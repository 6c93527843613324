"""Pure tensor functions: low-frequency views, HOG targets, patches."""

from mae_et.ops.hog import hog_cells, hog_targets
from mae_et.ops.lowfreq import downsample, low_frequency_crop
from mae_et.ops.patches import patchify, unpatchify

__all__ = ["downsample", "hog_cells", "hog_targets", "low_frequency_crop", "patchify", "unpatchify"]
