"""Models, machines and runs that were published: what the formulas are held against.

Megatron's: Narayanan et al. (SC'21), table 1; Korthikanti et al. (2022), table 5. Llama 3: Grattafiori et al., "The
Llama 3 Herd of Models" (2024), table 3. Mixtral: Jiang et al. (2024). Machines: the vendor's data sheets, decimal;
latencies, efficiencies and overlap are judgements.
"""

from .costs import Plan, Transformer
from .planner import Link, Machine


def megatron(hidden, layers, heads):
    """GPT with Megatron's vocabulary and sequence."""
    return Transformer(hidden, layers, heads, vocab=51200, sequence=2048)


def llama(hidden, layers, heads, ffn, vocab=128256, sequence=8192, kv_heads=8, **more):
    """Llama 3's kind: grouped heads, a gated MLP, RMSNorm, rotary positions, fused attention, no dropout."""
    options = {"gated": True, "bias": False, "rms_norm": True, "positions": False, "tied": False, "dropout": False}
    return Transformer(hidden, layers, heads, vocab, sequence, ffn, kv_heads, fused=True, **options | more)


MODELS = {
    "GPT-3 175 B": megatron(12288, 96, 96),
    "Llama 3 8 B": llama(4096, 32, 32, 14336),
    "Llama 3 70 B": llama(8192, 80, 64, 28672),
    "Llama 3.1 405 B": llama(16384, 126, 128, 53248),
    "Mixtral 8x7B": llama(4096, 32, 32, 14336, vocab=32000, experts=8, active=2),
}

# NVLink inside a node, InfiniBand of 200 and 400 Gbit/s a GPU between nodes; per direction
A100 = Machine(312e12, 80e9, 8, Link(5e-6, 300e9), Link(1e-5, 25e9), efficiency=0.62)
H100 = Machine(989e12, 80e9, 8, Link(5e-6, 450e9), Link(1e-5, 50e9), efficiency=0.5)

SC21 = [  # (model, plan, batch, TFLOP/s a GPU), all with full recomputation; parameters 1.7 B to 1 T
    (megatron(h, layers, a), Plan(dp=n // tp // pp, tp=tp, pp=pp, recompute="full"), batch, tflops)
    for h, layers, a, tp, pp, n, batch, tflops in (
        (2304, 24, 24, 1, 1, 32, 512, 137), (3072, 30, 32, 2, 1, 64, 512, 138), (4096, 36, 32, 4, 1, 128, 512, 142),
        (6144, 40, 48, 8, 1, 256, 1024, 135), (8192, 48, 64, 8, 2, 512, 1536, 138),
        (10240, 60, 80, 8, 4, 1024, 1792, 140), (12288, 80, 96, 8, 8, 1536, 2304, 148),
        (16384, 96, 128, 8, 16, 1920, 2160, 155), (20480, 105, 128, 8, 35, 2520, 2520, 163),
        (25600, 128, 160, 8, 64, 3072, 3072, 163),
    )
]  # fmt: skip
RECOMPUTATION = [  # (model, plan, batch, seconds with full recomputation, with sequence parallelism and selective)
    (megatron(h, layers, a), Plan(tp=8, pp=pp, v=v, micro=micro), batch, full, selective)
    for h, layers, a, pp, v, micro, batch, full, selective in (
        (6144, 48, 64, 1, 1, 4, 4, 1.42, 1.10), (12288, 96, 96, 8, 3, 1, 64, 18.13, 13.75),
        (20480, 105, 128, 35, 3, 1, 280, 49.05, 37.83), (25600, 128, 160, 64, 1, 1, 512, 94.42, 71.49),
    )
]  # fmt: skip
