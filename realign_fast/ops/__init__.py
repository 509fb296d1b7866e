"""Ops on rows of embeddings: the public functions, and the kernel that answers each of them."""

from .dispatch import INSTRUCTION_SETS as INSTRUCTION_SETS
from .dispatch import OPS as OPS
from .dispatch import Backend as Backend
from .dispatch import backend_of as backend_of
from .dispatch import chosen_backends as chosen_backends
from .dispatch import cpu_instruction_set as cpu_instruction_set
from .dispatch import why_no_cuda as why_no_cuda
from .functions import DTYPES as DTYPES
from .functions import RowSums as RowSums
from .functions import add_scatter_ as add_scatter_
from .functions import align_rows as align_rows
from .functions import sum_mapped_rows as sum_mapped_rows
from .functions import sum_rows as sum_rows
from .functions import working_dtype as working_dtype
