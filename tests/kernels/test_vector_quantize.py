"""`vector_quantize`: its values, and its gradients against rotations built in float64, gradcheck and vector-quantize-pytorch."""

import pytest
import torch
import torch.nn.functional as F
from dae_kernels.nearest_code import nearest_code
from dae_kernels.vector_quantize import VectorQuantized, vector_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = ["ste", "rotation"]
METRICS = ["l2", "cosine"]
EPS = torch.finfo(torch.float32).eps


def draw(N: int, K: int, D: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, codebook and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    x, codebook, cotangent = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, K, N))
    return x.to(DEVICE, dtype).requires_grad_(), codebook.to(DEVICE, dtype), cotangent.to(DEVICE, dtype)


def rotation(x_D: Tensor, e_D: Tensor) -> Tensor:
    """R [D, D] with R x / |x| = e / |e| that leaves all orthogonal to x and e alone, from a basis of their plane."""
    a = x_D / x_D.norm()
    e = e_D / e_D.norm()
    b = e - (e @ a) * a
    b = b / b.norm()
    cosine, sine = e @ a, e @ b
    plane = torch.stack([a, b])  # [2, D]
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return torch.eye(len(a), dtype=x_D.dtype, device=x_D.device) + plane.T @ (turn - torch.eye(2).to(turn)) @ plane


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape, K", [((63, 60), 7), ((1, 1), 1), ((2, 3, 5), 40), ((4,), 3), ((0, 4), 3)])
def test_value_is_the_code_to_the_bit(gradient, shape, K):
    torch.manual_seed(0)
    x, codebook = torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(K, shape[-1], device=DEVICE)
    out = vector_quantize(x, codebook, gradient=gradient)
    assert isinstance(out, VectorQuantized)
    assert torch.equal(out.indices, nearest_code(x, codebook)[0])
    assert torch.equal(out.quantized, codebook[out.indices])
    expected = 0.25 * (x - codebook[out.indices]).square().mean() if x.numel() else x.new_zeros(())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_negative_zeros_of_a_code_stay(gradient):
    codebook = torch.tensor([[-0.0, 0.0, 1.0], [5.0, 5.0, 5.0]], device=DEVICE)
    out = vector_quantize(torch.tensor([[0.1, -0.1, 1.0]], device=DEVICE), codebook, gradient=gradient)
    assert torch.equal(out.quantized.view(torch.int32), codebook[:1].view(torch.int32))


@pytest.mark.parametrize("metric", METRICS)
def test_straight_through(metric):
    x, codebook, cotangent = draw(63, 20, 6, torch.float64)
    out = vector_quantize(x, codebook, metric=metric)
    (gradient,) = torch.autograd.grad(out.quantized, x, cotangent)
    if metric == "l2":
        assert torch.equal(gradient, cotangent)
        return
    (expected,) = torch.autograd.grad(F.normalize(x, dim=1), x, cotangent)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(out.quantized, F.normalize(codebook, dim=1)[out.indices])
    torch.testing.assert_close(out.loss, 0.25 * (F.normalize(x, dim=1) - out.quantized.detach()).square().mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("N, K, D", [(63, 20, 6), (60, 5, 60), (20, 3, 2)])
def test_rotation_against_a_rotation_in_the_plane(dtype, N, K, D):
    x, codebook, cotangent = draw(N, K, D, dtype)
    out = vector_quantize(x, codebook, gradient="rotation")
    (gradient,) = torch.autograd.grad(out.quantized, x, cotangent)
    expected = []
    for x_D, e_D, g_D in zip(x.detach().double(), codebook[out.indices].double(), cotangent.double(), strict=True):
        R = rotation(x_D, e_D)
        torch.testing.assert_close(R @ R.T, torch.eye(D).to(R), rtol=0, atol=1e-12)
        torch.testing.assert_close(e_D.norm() / x_D.norm() * R @ x_D, e_D, rtol=1e-10, atol=1e-10)
        expected.append(e_D.norm() / x_D.norm() * g_D @ R)
    # A dozen roundings of terms as large as |gradient|; D of them are summed in each product.
    largest = torch.stack(expected).norm(dim=1).max().item()
    rounding = torch.finfo(dtype).eps * (12 + D) * largest
    torch.testing.assert_close(gradient.double(), torch.stack(expected), rtol=0, atol=max(rounding, 1e-12 * largest))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradcheck_of_what_is_held_constant(gradient):
    """With the code, R and |e| / |x| constant the operation is linear; these constants are taken by hand."""
    x, codebook, _ = draw(5, 4, 3, torch.float64)
    out = vector_quantize(x, codebook, gradient=gradient)
    code = codebook[out.indices]
    jacobian = torch.autograd.functional.jacobian(lambda x: vector_quantize(x, codebook, gradient=gradient).quantized, x)
    linear = torch.zeros(5, 3, 5, 3, dtype=torch.float64, device=DEVICE)
    for n in range(5):
        R = rotation(x[n].detach(), code[n]) * code[n].norm() / x[n].detach().norm()
        linear[n, :, n] = R if gradient == "rotation" else torch.eye(3)
    torch.testing.assert_close(jacobian, linear)
    assert torch.autograd.gradcheck(lambda x: vector_quantize(x, codebook, gradient=gradient).loss, (x,))


def test_cosine_commitment_passes_gradcheck():
    x, codebook, _ = draw(5, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x: vector_quantize(x, codebook, metric="cosine", commitment_weight=2.0).loss, (x,))


@pytest.mark.parametrize("metric", METRICS)
def test_rotation_keeps_angles_to_the_code(metric):
    """What the paper wants: gradient and code stand at the same angle as pulled-back gradient and x."""
    x, codebook, cotangent = draw(50, 9, 5, torch.float64)
    start = x if metric == "l2" else F.normalize(x.detach(), dim=1).requires_grad_()
    out = vector_quantize(start, codebook, gradient="rotation", metric=metric)
    (gradient,) = torch.autograd.grad(out.quantized, start, cotangent)
    if metric == "l2":
        torch.testing.assert_close(F.cosine_similarity(gradient, start), F.cosine_similarity(cotangent, out.quantized))
    else:  # the length of x does not matter, so its gradient has no part along x
        assert (gradient * start).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
def test_zero_and_opposite_vectors_stay_finite(gradient, metric):
    codebook = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1e-18, 0]], device=DEVICE)
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [1e-18, 1e-18, 0], [-1e-3, 1e-9, 0]], device=DEVICE).requires_grad_()
    for codes in (codebook, codebook[:1], -codebook[:1], codebook[1:2]):
        out = vector_quantize(x, codes, gradient=gradient, metric=metric)
        (slope,) = torch.autograd.grad(out.quantized.sum() + out.loss, x)
        assert out.quantized.isfinite().all() and out.loss.isfinite() and slope.isfinite().all()


def test_rotation_at_its_edges():
    e = torch.tensor([[2.0, 0, 0]], device=DEVICE)
    cotangent = torch.tensor([[3.0, 5.0, 7.0]], device=DEVICE)
    for x, expected in (
        ([0.0, 0, 0], [3.0, 5, 7]),  # no direction: straight through
        ([4.0, 0, 0], [1.5, 2.5, 3.5]),  # the same direction: the ratio of lengths
        ([-1.0, 0, 0], [-6.0, 10, 14]),  # the opposite: a reflection
    ):
        x = torch.tensor([x], device=DEVICE, requires_grad=True)
        (gradient,) = torch.autograd.grad(vector_quantize(x, e, gradient="rotation").quantized, x, cotangent)
        torch.testing.assert_close(gradient, torch.tensor([expected], device=DEVICE))
    (gradient,) = torch.autograd.grad(vector_quantize(x, 0 * e, gradient="rotation").quantized, x, cotangent)
    assert not gradient.any()  # |e| / |x| = 0


@pytest.mark.parametrize("D", [2, 8, 33])
def test_rotation_is_that_of_vector_quantize_pytorch(D):
    peer = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    x, codebook, cotangent = draw(40, 10, D, torch.float64)
    out = vector_quantize(x, codebook, gradient="rotation")
    theirs = peer.rotate_to(x, codebook[out.indices])
    torch.testing.assert_close(out.quantized, theirs)
    expected, gradient = (torch.autograd.grad(q, x, cotangent)[0] for q in (theirs, out.quantized))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_module_of_vector_quantize_pytorch(gradient):
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    module = peer.VectorQuantize(dim=8, codebook_size=20, commitment_weight=0.7, rotation_trick=gradient == "rotation").to(DEVICE)
    x, _, cotangent = draw(40, 1, 8)
    theirs, indices, loss = module(x[None], freeze_codebook=True)
    out = vector_quantize(x, module.codebook, gradient=gradient, commitment_weight=0.7)  # their weight is 1 by default
    assert torch.equal(out.indices, indices[0])
    torch.testing.assert_close(out.quantized, theirs[0], rtol=1e-5, atol=1e-6)  # theirs is x + (e - x), or R x |e| / |x|
    torch.testing.assert_close(out.loss, loss.squeeze())
    expected = torch.autograd.grad(theirs[0], x, cotangent, retain_graph=True)[0] + torch.autograd.grad(loss.sum(), x)[0]
    (got,) = torch.autograd.grad((out.quantized * cotangent).sum() + out.loss, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # float32, two orders of summation


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("x_dtype, code_dtype", [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_half_operands(gradient, x_dtype, code_dtype):
    x, codebook, cotangent = draw(30, 9, 5)
    x = x.detach().to(getattr(torch, x_dtype)).requires_grad_()
    codebook = codebook.to(getattr(torch, code_dtype))
    out = vector_quantize(x, codebook, gradient=gradient)
    assert out.quantized.dtype == codebook.dtype and out.loss.dtype == torch.float32
    assert torch.equal(out.quantized, codebook[out.indices])
    cotangent = cotangent.to(codebook.dtype)
    (got,) = torch.autograd.grad(out.quantized, x, cotangent)
    wide = x.detach().double().requires_grad_()
    reference = vector_quantize(wide, codebook.double(), gradient=gradient)
    (expected,) = torch.autograd.grad(reference.quantized, wide, cotangent.double())
    # float32 inside, rounded to the dtype of x at the end.
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(x.dtype).eps / 2 + 64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_kernel_gives_the_same(gradient, metric):
    x, codebook, cotangent = draw(33, 17, 6)
    outs = [vector_quantize(x, codebook, gradient=gradient, metric=metric, impl=impl) for impl in ("reference", "triton")]
    gradients = [torch.autograd.grad((out.quantized * cotangent).sum() + out.loss, x)[0] for out in outs]
    assert torch.equal(outs[0].indices, outs[1].indices) and torch.equal(*gradients)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_layouts_do_not_matter(gradient):
    torch.manual_seed(1)
    image, codebook = torch.randn(2, 6, 3, 5, device=DEVICE), torch.randn(6, 20, device=DEVICE).T
    for x in (image.movedim(1, -1), image[0, :, 0, 0].expand(4, 3, 6), image[:, :, 1].transpose(1, 2)):
        results = []
        for layout in (x.clone(), x.contiguous()):
            layout.requires_grad_()
            out = vector_quantize(layout, codebook, gradient=gradient)
            results.append((out.quantized, torch.autograd.grad(out.quantized.square().sum() + out.loss, layout)[0]))
        torch.testing.assert_close(results[0], results[1])


@settings(max_examples=20, deadline=None)
@given(N=st.integers(1, 20), K=st.integers(1, 20), D=st.integers(1, 8), power=st.integers(-3, 3), seed=st.integers(0, 99))
def test_properties(N, K, D, power, seed):
    """Scaling everything by a power of two scales the codes, leaves the gradient and squares in the loss."""
    x, codebook, cotangent = draw(N, K, D, torch.float64, seed)
    scale = 2.0**power
    for gradient in GRADIENTS:
        out = vector_quantize(x, codebook, gradient=gradient)
        scaled_x = (x.detach() * scale).requires_grad_()
        scaled = vector_quantize(scaled_x, codebook * scale, gradient=gradient)
        assert torch.equal(scaled.indices, out.indices) and torch.equal(scaled.quantized, out.quantized * scale)
        torch.testing.assert_close(scaled.loss, out.loss * scale**2)
        slopes = [torch.autograd.grad(q, z, cotangent)[0] for q, z in ((out.quantized, x), (scaled.quantized, scaled_x))]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
def test_each_head_has_its_codebook(gradient, metric):
    torch.manual_seed(2)
    x, codebook = torch.randn(5, 4, 3, 6, device=DEVICE, requires_grad=True), torch.randn(3, 9, 6, device=DEVICE)
    out = vector_quantize(x, codebook, gradient=gradient, metric=metric)
    cotangent = torch.randn_like(x)
    slope = torch.autograd.grad((out.quantized * cotangent).sum() + out.loss, x)[0]
    heads = [vector_quantize(x[:, :, h], codebook[h], gradient=gradient, metric=metric) for h in range(3)]
    assert torch.equal(out.indices, torch.stack([head.indices for head in heads], dim=2))
    assert torch.equal(out.quantized, torch.stack([head.quantized for head in heads], dim=2))
    torch.testing.assert_close(out.loss, sum(head.loss for head in heads) / 3)
    total = sum((head.quantized * cotangent[:, :, h]).sum() + head.loss / 3 for h, head in enumerate(heads))
    torch.testing.assert_close(slope, torch.autograd.grad(total, x)[0])


def test_the_codebook_gets_no_gradient():
    x, codebook, _ = draw(5, 4, 3)
    codebook.requires_grad_()
    for gradient in GRADIENTS:
        out = vector_quantize(x, codebook, gradient=gradient)
        assert torch.autograd.grad(out.quantized.sum() + out.loss, codebook, allow_unused=True) == (None,)
    assert not vector_quantize(x.detach(), codebook).loss.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiles_into_one_graph(gradient):
    torch._dynamo.reset()
    compiled = torch.compile(vector_quantize, fullgraph=True, backend="aot_eager")
    for N in (6, 9, 11):
        x, codebook, cotangent = draw(N, 7, 5)
        out, expected = compiled(x, codebook, gradient=gradient), vector_quantize(x, codebook, gradient=gradient)
        assert torch.equal(out.quantized, expected.quantized) and torch.equal(out.indices, expected.indices)
        slopes = [torch.autograd.grad((o.quantized * cotangent).sum() + o.loss, x)[0] for o in (out, expected)]
        torch.testing.assert_close(*slopes)


ERRORS = {
    "gradient": ({"gradient": "gumbel"}, "gradient must be one of 'ste', 'rotation', got 'gumbel'"),
    "weight": ({"commitment_weight": -1.0}, "commitment_weight must be finite and not negative, got -1.0"),
    "nan weight": ({"commitment_weight": float("nan")}, "got nan"),
    "metric": ({"metric": "l1"}, "metric must be one of"),
    "precision": ({"precision": "high"}, "precision must be one of"),
    "impl": ({"impl": "cuda"}, "impl must be one of"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(case):
    options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        vector_quantize(torch.zeros(3, 4), torch.zeros(5, 4), **options)
    with pytest.raises(ValueError, match=r"got x \[3, 4\], codebook \[5, 6\]"):
        vector_quantize(torch.zeros(3, 4), torch.zeros(5, 6))
    with pytest.raises(TypeError, match="got x of"):
        vector_quantize(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(5, 4))
