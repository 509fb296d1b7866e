"""Values, defaults and errors of options, for the library and the command line."""

from typing import Literal

BadRows = Literal["error", "skip", "keep"]
Modality = Literal["text", "image"]
FormatName = Literal[
    "npy", "npz", "pt", "safetensors", "parquet", "arrow", "arrow-stream", "hf", "pickle", "tar"
]
Method = Literal[
    "realign", "mean-shift", "diagonal", "coral", "optimal-transport", "blockwise", "noise"
]
BATCH_BYTES = 16 << 20  # smaller batches give the threads of a busy machine too little at a time

Precision = Literal["fp32", "bf16"]  # of the model that embeds
RowDtype = Literal["float16", "float32"]  # of embedded rows on disk
ModelDtype = Literal["float32", "bfloat16", "float16"]  # of a language model
Dtype = Literal["float16", "bfloat16", "float32", "float64"]  # of rows on disk
LogLevel = Literal["debug", "info", "warning", "error"]
SHARD_ROWS = 100_000  # items of an embedded shard

ProjectorName = Literal["linear", "mlp", "prefix"]
TemplateName = Literal["plain", "chat"]
VISUAL_TOKENS = 576  # of an image
DEFAULT_QUESTION = "Describe the image."


class OptionError(ValueError):
    """Options exclude each other, or do not fit the output that is named."""


class UnfinishedShards(ValueError):
    """Some shards of a pass or of a job array are not finished, and the run reads no rows."""
