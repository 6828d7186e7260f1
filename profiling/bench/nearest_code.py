"""Cases of nearest_code. 2 N K D flop; each operand read once, an int64 and a float32 per vector written."""

from functools import partial
from importlib import import_module

import torch
from cases import Case
from dae_kernels.dispatch import triton_refusal
from dae_kernels.nearest_code import nearest_code

SHAPES = {
    "cuda": [{"N": 32768, "K": 16384, "D": 256}, {"N": 32768, "K": 16384, "D": 8}, {"N": 8192, "K": 1024, "D": 64}],
    "cpu": [{"N": 8192, "K": 4096, "D": 64}],
}
DTYPES = {"cuda": ["bfloat16", "float32"]}


def cases(device, dtype, N, K, D):
    x_ND, codebook_KD = torch.randn(N, D, device=device).to(dtype), torch.randn(K, D, device=device).to(dtype)
    work = {"flops": 2 * N * K * D, "bytes": x_ND.nbytes + codebook_KD.nbytes + 12 * N}
    case, ours = partial(Case, "nearest_code", product=dtype, **work), partial(nearest_code, x_ND, codebook_KD)

    def product_argmin():
        return torch.addmm(codebook_KD.square().sum(dim=1), x_ND, codebook_KD.T, alpha=-2).argmin(dim=1)

    def vector_quantize_pytorch():
        cdist = import_module("vector_quantize_pytorch.vector_quantize_pytorch").cdist
        return (-cdist(x_ND[None].float(), codebook_KD[None].float())).argmax(dim=-1)[0]

    def keops():
        lazy = import_module("pykeops.torch").LazyTensor
        return ((lazy(x_ND.float()[:, None]) - lazy(codebook_KD.float()[None])) ** 2).sum(dim=2).argmin(dim=1).flatten()

    def flash_kmeans():
        assign = import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
        return assign(x_ND[None], codebook_KD[None], x_ND.float().square().sum(dim=1)[None])[0].long()

    def sklearn():
        argmin = import_module("sklearn.metrics").pairwise_distances_argmin
        return torch.from_numpy(argmin(x_ND.float().numpy(), codebook_KD.float().numpy()))

    def scipy():
        return torch.from_numpy(import_module("scipy.cluster.vq").vq(x_ND.float().numpy(), codebook_KD.float().numpy())[0])

    refusal, on_cpu = triton_refusal(device), None if device.type == "cpu" else "works on the CPU"
    fast = "tf32" if dtype == torch.float32 and device.type == "cuda" else dtype
    yield case("reference", partial(ours, impl="reference"), note="float64 where float32 cannot decide")
    yield case("triton, exact", partial(ours, precision="exact", impl="triton"), refusal=refusal)
    yield case("triton, fast", partial(ours, precision="fast", impl="triton"), product=fast, refusal=refusal)
    yield case("product + argmin", product_argmin, note="scores in the dtype of x")
    yield case("compile, product + argmin", torch.compile(product_argmin), note="scores in the dtype of x")
    yield case("cdist + argmin", lambda: torch.cdist(x_ND.float(), codebook_KD.float()).argmin(dim=1))
    note = "the two lines of its search, without its one-hot matrix and lookup"
    yield case("vector_quantize_pytorch", vector_quantize_pytorch, needs="vector_quantize_pytorch", note=note)
    yield case("flash-kmeans", flash_kmeans, needs="flash_kmeans", refusal=refusal, note="its assignment step")
    yield case("keops", keops, needs="pykeops")
    yield case("scikit-learn", sklearn, needs="sklearn", refusal=on_cpu)
    yield case("scipy vq", scipy, needs="scipy", refusal=on_cpu)
    yield case("product alone", lambda: x_ND @ codebook_KD.T, note="no search: the scores' product, written")
