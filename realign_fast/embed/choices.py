"""The values that an option of `embed` may have, as types; `typing.get_args` lists them."""

import os
from typing import Literal

from ..interface.option_values import EmbedMode
from ..interface.option_values import Precision as Precision
from ..interface.option_values import RowDtype as RowDtype

StrPath = str | os.PathLike[str]

Mode = EmbedMode
Content = Literal["images", "texts", "pairs"]  # of a source; a pair is an image with its caption
Side = Literal["text", "image"]  # of the result
