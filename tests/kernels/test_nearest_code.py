"""`nearest_code` against brute force in float64, both implementations.

Tolerances: an implementation may err as much as twice torch's own float32 arithmetic does on the same operands, or the roundings
as they are counted (tests/tolerances.py) where that happens to be less.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from dae_kernels import nearest_code
from dae_kernels.nearest_code import api, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import largest, rounding_bound
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "triton"]
METRICS = ["l2", "cosine"]
EPS = torch.finfo(torch.float32).eps
BUFFERS = {"score": torch.float32, "candidate": torch.int32, "index": torch.int64, "distance": torch.float32}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def brute_force(x_ND: Tensor, codebook_KD: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    """[N, K] distances by their formula, one vector at a time."""
    x_ND, codebook_KD = x_ND.to(dtype), codebook_KD.to(dtype)
    if metric == "cosine":
        x_ND, codebook_KD = (torch.nn.functional.normalize(t, dim=1, eps=0.0).nan_to_num(0.0) for t in (x_ND, codebook_KD))
        return torch.stack([1 - (x_D * codebook_KD).sum(dim=1) for x_D in x_ND])
    return torch.stack([(x_D - codebook_KD).square().sum(dim=1) for x_D in x_ND])


def check(x: Tensor, codebook: Tensor, metric: str, **options) -> None:
    index, distance = nearest_code(x, codebook, metric=metric, **options)
    assert index.dtype == torch.int64 and distance.dtype == torch.float32
    assert index.shape == distance.shape == x.shape[:-1]
    x_ND, index, distance = x.reshape(-1, x.shape[-1]), index.flatten(), distance.flatten()
    if not len(x_ND):
        return
    truth = brute_force(x_ND, codebook, metric, torch.float64)
    chosen = truth.gather(1, index[:, None])[:, 0]

    # Of the cosine, roundings of 1 and of products of unit vectors; of l2, of the differences, squares and their sum.
    torch_error = largest(brute_force(x_ND, codebook, metric, torch.float32).double() - truth)
    magnitude = 2.0 if metric == "cosine" else truth.max().item()
    floor = rounding_bound(x.shape[-1] + 4, magnitude, torch.float32)
    assert largest(distance.double() - chosen) <= max(2 * torch_error, floor)

    # Two scores decide, each with its own error. A score is as large as |c|^2 + 2 |x| |c| and cancels down to the distance.
    allowed = max(2 * torch_error, floor)
    if metric == "l2":
        wide, score = (x_ND.double(), codebook.double()), lambda x, c: c.square().sum(1) - 2 * x @ c.T
        size = (wide[1].square().sum(1) + 2 * wide[0].abs() @ wide[1].abs().T).max().item()
        torch_error = largest(score(x_ND.float(), codebook.float()).double() - score(*wide))
        allowed = max(2 * torch_error, rounding_bound(x.shape[-1] + 2, size, torch.float32))
    assert (chosen - truth.min(dim=1).values).max() <= 2 * allowed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "N, K, D", [(63, 60, 8), (1, 1, 1), (60, 63, 63), (5, 1, 17), (60, 130, 1), (130, 70, 100), (1, 300, 32)]
)
def test_nearest_code_matches_brute_force_float32(impl, metric, N, K, D):
    torch.manual_seed(N + K + D)
    check(torch.randn(N, D, device=DEVICE), torch.randn(K, D, device=DEVICE), metric, impl=impl)


@pytest.mark.parametrize("metric", METRICS)
def test_reference_picks_the_same_codes_as_float64(metric):
    torch.manual_seed(0)
    for x, codebook in (
        (torch.randn(500, 8), torch.randn(700, 8)),
        (torch.randn(500, 16), (torch.rand(700, 16) * 2 - 1) / 700),  # the usual initialisation: nearly all scores cancel
        (torch.randn(100, 3) + 1000, torch.randn(50, 3) + 1000),
    ):
        index, _ = nearest_code(x, codebook, metric=metric, impl="reference")
        assert torch.equal(index, brute_force(x, codebook, metric, torch.float64).argmin(dim=1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    "x_dtype, code_dtype",
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float16)],
)
def test_half_operands_lose_nothing_by_exact(impl, precision, x_dtype, code_dtype):
    torch.manual_seed(1)
    x, codebook = torch.randn(70, 24, device=DEVICE).to(x_dtype), torch.randn(90, 24, device=DEVICE).to(code_dtype)
    if precision == "exact" or x_dtype == code_dtype or impl == "reference":
        check(x, codebook, "l2", impl=impl, precision=precision)
    else:  # one product of operands rounded to tf32 or float16 (11 bits), relative to |x| |c|
        index, _ = nearest_code(x, codebook, impl=impl, precision=precision)
        truth = brute_force(x, codebook, "l2", torch.float64)
        excess = truth.gather(1, index[:, None])[:, 0] - truth.min(dim=1).values
        bound = 4 * 2**-11 * x.double().norm(dim=1) * codebook.double().norm(dim=1).max()
        assert (excess <= bound).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("codebook_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16(impl, codebook_dtype):
    torch.manual_seed(2)
    check(torch.randn(63, 60, device=DEVICE).bfloat16(), torch.randn(200, 60, device=DEVICE).to(codebook_dtype), "l2", impl=impl)


def test_float64_is_for_the_reference_alone():
    torch.manual_seed(3)
    x, codebook = torch.randn(20, 6, dtype=torch.float64), torch.randn(30, 6)
    check(x, codebook, "l2")
    with pytest.raises(ValueError, match="float64"):
        nearest_code(x, codebook, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("N", [1, 10])
def test_lowest_index_wins_a_tie(impl, metric, N):
    torch.manual_seed(4)
    for K, D in ((30, 5), (65, 64), (100, 33)):  # the copies fall into other tiles and other lanes
        codes = torch.randn(K, D, device=DEVICE)
        codebook = torch.cat([codes, codes[torch.randperm(K)], codes])
        x = torch.randn(N, D, device=DEVICE)
        index, _ = nearest_code(x, codebook, metric=metric, impl=impl)
        assert torch.equal(index, nearest_code(x, codes, metric=metric, impl="reference")[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_all_codes_equal(impl):
    x = torch.randn(7, 6, device=DEVICE)
    index, distance = nearest_code(x, torch.zeros(70, 6, device=DEVICE), impl=impl)
    assert not index.any()
    torch.testing.assert_close(distance, x.square().sum(1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_code_is_its_own_nearest(impl, metric):
    codebook = torch.randn(67, 12, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5))
    index, distance = nearest_code(codebook, codebook, metric=metric, impl=impl)
    assert torch.equal(index, torch.arange(67, device=DEVICE))
    # l2 subtracts equal numbers; 1 - cosine keeps a few roundings of 1.
    assert distance.abs().max() <= (0 if metric == "l2" else 4 * EPS)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors_have_cosine_zero(impl):
    x = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, 2.0]], device=DEVICE)
    codebook = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 5.0]], device=DEVICE)
    index, distance = nearest_code(x, codebook, metric="cosine", impl=impl)
    assert index.tolist() == [0, 1, 2]  # tie of all; the zero code and [0, 5] tie at 0 against -1; the same direction
    torch.testing.assert_close(distance.cpu(), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=2 * EPS)


@pytest.mark.parametrize("impl", IMPLS)
def test_cosine_ignores_length(impl):
    torch.manual_seed(6)
    x, codebook = torch.randn(40, 9, device=DEVICE), torch.randn(50, 9, device=DEVICE)
    index, distance = nearest_code(x, codebook, metric="cosine", impl=impl)
    powers = 2.0 ** torch.randint(-3, 4, (50, 1), device=DEVICE)  # the same bits but for the exponent
    scaled_index, scaled_distance = nearest_code(x * 8, codebook * powers, metric="cosine", impl=impl)
    assert torch.equal(index, scaled_index) and torch.equal(distance, scaled_distance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
def test_strides_do_not_matter(impl, metric):
    torch.manual_seed(7)
    image = torch.randn(2, 6, 3, 5, device=DEVICE)
    wide = torch.randn(20, 2, 6, device=DEVICE)
    cases = [
        (image.permute(0, 2, 3, 1), wide[:, 0]),
        (image[0, :, 0, 0].expand(4, 3, 6), wide[:, 1]),
        (image[:, :, 1].transpose(1, 2), torch.randn(6, 20, device=DEVICE).T),
        (image[:, :, ::2, 1].movedim(1, -1), wide[::2, 0]),
        (image[0, :, 0, 0], wide[:, 0]),
    ]
    for x, codebook in cases:
        index, distance = nearest_code(x, codebook, metric=metric, impl=impl)
        dense_index, dense_distance = nearest_code(x.contiguous(), codebook.contiguous(), metric=metric, impl=impl)
        assert index.shape == x.shape[:-1]
        assert torch.equal(index, dense_index) and torch.equal(distance, dense_distance)
        check(x, codebook, metric, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_vectors(impl):
    index, distance = nearest_code(torch.empty(2, 0, 5, device=DEVICE), torch.randn(3, 5, device=DEVICE), impl=impl)
    assert index.shape == distance.shape == (2, 0)
    assert index.dtype == torch.int64 and distance.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_not_finite_operands_give_an_index_in_range(impl, bad):
    torch.manual_seed(8)
    x, codebook = torch.randn(6, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    x[1, 2] = bad
    x[3] = bad
    for codes in (codebook, torch.full_like(codebook, bad)):
        index, _ = nearest_code(x, codes, impl=impl)
        assert index.min() >= 0 and index.max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_of_the_reference_do_not_show(monkeypatch, dtype):
    torch.manual_seed(9)
    x, codebook = torch.randn(150, 6, dtype=dtype), torch.randn(140, 6, dtype=dtype)
    whole = nearest_code(x, codebook, impl="reference")
    assert torch.equal(whole[0], brute_force(x, codebook, "l2", torch.float64).argmin(dim=1))
    for rows in (1, 2, 70):
        monkeypatch.setattr(reference, "MAX_SCORES", {"cpu": rows * 192})
        index, distance = nearest_code(x, codebook, impl="reference")
        assert torch.equal(index, whole[0]) and torch.equal(distance, whole[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("leading, H, K, D", [((70,), 3, 65, 20), ((2, 3), 1, 7, 5), ((), 4, 9, 17), ((0,), 2, 3, 4)])
def test_each_head_has_its_codebook(impl, metric, leading, H, K, D):
    torch.manual_seed(17)
    wide = torch.randn(*leading, D, H, device=DEVICE)
    for x in (wide.mT, wide.mT.contiguous()):
        codebook = torch.randn(K, H, D, device=DEVICE).transpose(0, 1)
        index, distance = nearest_code(x, codebook, metric=metric, impl=impl)
        assert index.shape == distance.shape == (*leading, H)
        for h in range(H):
            expected = nearest_code(x[..., h, :], codebook[h], metric=metric, impl=impl)
            assert torch.equal(index[..., h], expected[0])
            assert torch.equal(distance[..., h], expected[1])


def test_heads_of_the_kernel_stay_inside_their_codebooks(monkeypatch):
    """The other head's codes and what lies around would win: every code of a head is the best of the other head's rows."""
    from dae_kernels.nearest_code import fused, layout

    monkeypatch.setattr(layout, "split_count", lambda *_: 2)
    torch.manual_seed(18)
    N, K, D, guard = 33, 45, 20, 7
    x = torch.randn(N, 2, D, device=DEVICE)
    codebook = torch.stack([x[:, 1].repeat(2, 1)[:K], x[:, 0].repeat(2, 1)[:K]])
    inner = {"norm": (2, K), "score": (3, 2, N, 2), "candidate": (2, 2, N, 2), "index": (N, 2), "distance": (N, 2)}
    dtypes = {"candidate": torch.int32, "index": torch.int64}
    wholes, views = {}, []
    for name, shape in inner.items():
        filling = -float("inf") if name == "norm" else -7
        size = 2 * guard + math.prod(shape)
        wholes[name] = torch.full((size,), filling, dtype=dtypes.get(name, torch.float32), device=DEVICE)
        views.append(wholes[name][guard:-guard].view(shape))
    launches = layout.SearchLayout(N, 2, K, D, x.dtype, x.dtype, False, True, x.device)
    fused.launch(launches, x, codebook, *views)
    for name, whole in wholes.items():
        filling = -float("inf") if name == "norm" else -7
        assert (whole[:guard] == filling).all() and (whole[-guard:] == filling).all(), name
    index = views[3]
    assert torch.equal(index, nearest_code(x, codebook, impl="reference")[0])


def test_vmap_over_codebooks():
    torch.manual_seed(16)
    x, codebook = torch.randn(3, 20, 4), torch.randn(3, 50, 4)
    index, distance = torch.vmap(nearest_code)(x, codebook)
    for h in range(3):
        expected = nearest_code(x[h], codebook[h])
        assert torch.equal(index[h], expected[0])
        torch.testing.assert_close(distance[h], expected[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K, D", [(45, 20), (128, 64)])  # with masks, and without: whole tiles of codes, and of coordinates
def test_kernel_stays_inside_its_buffers(metric, dtype, K, D):
    """What lies around the operands would win every comparison, what lies around the results must survive."""
    from dae_kernels.nearest_code import fused, layout

    torch.manual_seed(10)
    N, guard = 33, 160
    x_ND, codebook_KD = torch.randn(N, D, device=DEVICE).to(dtype), torch.randn(K, D, device=DEVICE).to(dtype)
    bait = x_ND[:1].repeat(guard, 1)  # codes at distance 0 of the first row

    def guarded(inner: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.cat([around, inner, around])
        return whole, whole[len(around) : len(around) + len(inner)]

    _, x = guarded(x_ND, torch.full((guard, D), float("nan"), dtype=dtype, device=DEVICE))
    _, codebook = guarded(codebook_KD, bait)
    # A norm that wins whatever the product: -inf added, or a huge factor.
    around_norm = torch.full((guard,), -float("inf") if metric == "l2" else 1e30, device=DEVICE)
    norms, norm = guarded(torch.zeros(K, device=DEVICE), around_norm)
    around = {name: torch.full((guard,), -7, dtype=dtype, device=DEVICE) for name, dtype in BUFFERS.items()}
    scores, score = guarded(torch.zeros(3 * N, device=DEVICE), around["score"])
    candidates, candidate = guarded(torch.zeros(2 * N, dtype=torch.int32, device=DEVICE), around["candidate"])
    indices, index = guarded(torch.zeros(N, dtype=torch.int64, device=DEVICE), around["index"])
    distances, distance = guarded(torch.zeros(N, device=DEVICE), around["distance"])

    launches = layout.SearchLayout(N, 1, K, D, dtype, dtype, metric == "cosine", True, x.device)
    fused.launch(launches, x, codebook, norm[None], score, candidate, index, distance)

    assert torch.equal(norms[:guard], around_norm) and torch.equal(norms[-guard:], around_norm)
    for whole in (scores, candidates, indices, distances):
        assert (whole[:guard] == -7).all() and (whole[-guard:] == -7).all()
    expected_index, expected_distance = nearest_code(x_ND, codebook_KD, metric=metric, impl="triton")
    assert torch.equal(index, expected_index) and torch.equal(distance, expected_distance)
    assert torch.equal(index, nearest_code(x_ND, codebook_KD, metric=metric, impl="reference")[0])


@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 40), K=st.integers(1, 80), D=st.integers(1, 40), metric=st.sampled_from(METRICS))
def test_both_implementations_meet_brute_force_on_any_shape(N, K, D, metric):
    torch.manual_seed(N + 100 * K + 10_000 * D)
    x, codebook = torch.randn(N, D, device=DEVICE), torch.randn(K, D, device=DEVICE)
    for impl in IMPLS:
        check(x, codebook, metric, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_carry_no_gradient(impl):
    x = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    codebook = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    index, distance = nearest_code(x, codebook, impl=impl)
    assert not index.requires_grad and not distance.requires_grad


def test_autocast_does_not_touch_the_operands():
    torch.manual_seed(11)
    x, codebook = torch.randn(300, 8, device=DEVICE), torch.randn(400, 8, device=DEVICE)
    expected = nearest_code(x, codebook, impl="reference")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        index, distance = nearest_code(x, codebook, impl="reference")
    assert torch.equal(index, expected[0]) and torch.equal(distance, expected[1])


@pytest.mark.parametrize("metric", METRICS)
def test_compiles_into_one_graph_for_all_lengths(metric):
    torch.manual_seed(12)
    torch._dynamo.reset()
    compiled = torch.compile(nearest_code, fullgraph=True, backend="aot_eager")
    for N in range(1, 14):  # one graph for N = 1, one for the second length, and one for all others, or Dynamo gives up
        x, codebook = torch.randn(N, 2, 5, device=DEVICE), torch.randn(33, 5, device=DEVICE)
        index, distance = compiled(x, codebook, metric=metric)
        assert torch.equal(index, nearest_code(x, codebook, metric=metric)[0])
        torch.testing.assert_close(distance, nearest_code(x, codebook, metric=metric)[1])


@pytest.mark.slow
def test_compiles_with_inductor():
    torch.manual_seed(12)
    torch._dynamo.reset()
    codes = torch.randn(33, 5, device=DEVICE)
    x, codebook = torch.randn(6, 2, 5, device=DEVICE), torch.cat([codes, codes])
    index, distance = torch.compile(nearest_code, fullgraph=True)(x, codebook)
    assert torch.equal(index, nearest_code(x, codes)[0])
    torch.testing.assert_close(distance, nearest_code(x, codes)[1])


def test_operator_passes_torch_checks():
    from dae_kernels.nearest_code.fused import nearest_code_triton

    codebook = torch.randn(2, 4, 3, device=DEVICE)
    for N in (0, 5):
        torch.library.opcheck(nearest_code_triton.op, (torch.randn(N, 2, 3, device=DEVICE), codebook, False, True))


def test_operator_is_registered_without_the_interpreter():
    """The operator of a GPU run, traced on fake CUDA tensors in a process without the interpreter."""
    script = (
        "import torch; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from dae_kernels.nearest_code.fused import nearest_code_triton\n"
        "with FakeTensorMode():\n"
        "    codebook = torch.empty(1, 9, 5, device='cuda')\n"
        "    for N in (7, 0):\n"
        "        index, distance = nearest_code_triton(torch.empty(N, 1, 5, device='cuda'), codebook, False, True)\n"
        "        print(index.shape[0], index.dtype, index.device.type, distance.shape[0], distance.dtype)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["7 torch.int64 cuda 7 torch.float32", "0 torch.int64 cuda 0 torch.float32"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N, K, D", [(5000, 16384, 8), (3000, 1024, 256), (777, 4099, 100)])
def test_exact_kernel_at_real_sizes(dtype, N, K, D):
    torch.manual_seed(13)
    x, codebook = torch.randn(N, D, device="cuda").to(dtype), torch.randn(K, D, device="cuda").to(dtype)
    check(x, codebook, "l2", impl="triton")
    check(x, codebook, "cosine", impl="triton")


ERRORS = {
    "metric": ((3, 4), (5, 4), {"metric": "l1"}, ValueError, "metric must be one of 'l2', 'cosine', got 'l1'"),
    "precision": ((3, 4), (5, 4), {"precision": "high"}, ValueError, "precision must be one of"),
    "impl": ((3, 4), (5, 4), {"impl": "cuda"}, ValueError, "impl must be one of"),
    "width": ((3, 4), (5, 6), {}, ValueError, r"got x \[3, 4\], codebook \[5, 6\]"),
    "no rows": ((), (5, 6), {}, ValueError, r"got x \[\]"),
    "4-D codebook": ((3, 4), (1, 1, 5, 4), {}, ValueError, r"or x \[..., H, D\] and codebook \[H, K, D\]"),
    "no heads in x": ((4,), (1, 5, 4), {}, ValueError, r"got x \[4\], codebook \[1, 5, 4\]"),
    "other heads": ((3, 2, 4), (3, 5, 4), {}, ValueError, r"got x \[3, 2, 4\], codebook \[3, 5, 4\]"),
    "no head": ((3, 0, 4), (0, 5, 4), {}, ValueError, "at least one code"),
    "no codes": ((3, 4), (0, 4), {}, ValueError, "at least one code"),
    "no dimensions": ((3, 0), (5, 0), {}, ValueError, "at least one code and one dimension"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    x_shape, codebook_shape, options, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        nearest_code(torch.zeros(x_shape), torch.zeros(codebook_shape), **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="got x of"):
        nearest_code(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(5, 4))
    with pytest.raises(TypeError, match="got codebook of"):
        nearest_code(torch.zeros(3, 4), torch.zeros(5, 4, dtype=torch.int32))


def test_two_devices_are_refused():
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        nearest_code(torch.zeros(3, 4), torch.zeros(5, 4, device="meta"))


def test_auto_on_cpu_is_the_reference(monkeypatch):
    monkeypatch.setattr(api, "nearest_code_reference", lambda *_: (torch.full((3,), 77), torch.zeros(3)))
    assert nearest_code(torch.zeros(3, 4), torch.zeros(5, 4))[0].tolist() == [77, 77, 77]
