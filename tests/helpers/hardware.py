"""What a test needs of the machine."""

import pytest
import torch

from opcd.accel.precision import has_bfloat16

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16("cpu"), reason="this CPU has no bfloat16 instructions")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
