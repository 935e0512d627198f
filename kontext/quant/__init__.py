"""Linears whose weights are kept in few bits: 8-bit floats, 8-bit whole numbers, or 4 bits.

`values` rounds weights and restores them, `four` does so for 4 bits, `restored` multiplies by what it restores, `products`
multiplies 8-bit numbers by 8-bit numbers, `linear` has the layers. `widened` has layers that keep 16 bits.
"""

from kontext.quant.linear import Product, ProductLinear, QuantisedLinear, quantised_linear
from kontext.quant.products import supported
from kontext.quant.restored import STRIP, restores_strips
from kontext.quant.values import BLOCK, FP8, Mode, Quantised, dequantise, quantisable, quantise, stored_bytes
from kontext.quant.widened import keep_in

__all__ = [
    "BLOCK",
    "FP8",
    "STRIP",
    "Mode",
    "Product",
    "ProductLinear",
    "Quantised",
    "QuantisedLinear",
    "dequantise",
    "keep_in",
    "quantisable",
    "quantise",
    "quantised_linear",
    "restores_strips",
    "stored_bytes",
    "supported",
]
