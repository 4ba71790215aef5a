"""Mixed precision: compute in 16 bits, remember in 32, and scale the loss so that small gradients survive.

                bits: sign, exponent, mantissa    smallest above 0     largest      1 + what is still another number
    float32     1, 8, 23                          1.4e-45              3.4e38       1.2e-7
    float16     1, 5, 10                          6.0e-8               65,504       9.8e-4
    bfloat16    1, 8, 7                           9.2e-41              3.4e38       7.8e-3

Four parts, each of use by itself. `autocast` picks the precision of each operation, weights staying float32.
`LossScaler` multiplies the loss and divides the gradients again, skips a step whose gradients overflowed, and has all
ranks agree on that. `average_gradients` reduces them in whatever precision. `MasterWeights` is for models that are
16 bits throughout. float16 needs the scaler; bfloat16, with float32's exponents, does not.

Sources: Micikevicius et al., "Mixed Precision Training" (2018), sections 3.1 to 3.3; Kalamkar et al., "A Study of
BFLOAT16 for Deep Learning Training" (2019). The scaler's rules are those of torch.amp.GradScaler.
"""

from .autocasting import autocast
from .checks import check_precision
from .scaling import LossScaler, MasterWeights, average_gradients

__all__ = ["LossScaler", "MasterWeights", "autocast", "average_gradients", "check_precision"]
