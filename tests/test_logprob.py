"""The log-prob kernel (sample.py, section 3) against fp64, and wrong versions of it that the same check must reject.

The Triton kernels run on CPU tensors under TRITON_INTERPRET=1, which Triton reads when a kernel is defined: those tests run in
a subprocess, this same file with the variable set.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(sample.triton is None, reason="triton is not installed")
BACKENDS = ["torch"] + ["triton"] * INTERPRETED


def reference(logits, targets, temperature, g_logprob, g_entropy):
    """fp64: logprob, entropy, and the gradient of sum(g_logprob * logprob + g_entropy * entropy) with respect to the logits."""
    x = logits.detach().double().requires_grad_()
    logp = torch.log_softmax(x / temperature, -1)
    kept = targets != sample.IGNORE
    logprob = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(~kept, 0)
    entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1).masked_fill(~kept, 0)
    (logprob * g_logprob + entropy * g_entropy).sum().backward()
    return logprob.detach(), entropy.detach(), x.grad


def distance(value, expected):
    """Relative error in the largest entry; NaN counts as infinite."""
    scale = max(expected.double().abs().max().item(), 1e-6) if expected.numel() else 1.0
    error = (value.double() - expected.double()).abs()
    return 0.0 if not expected.numel() else torch.nan_to_num(error, nan=torch.inf).max().item() / scale


def inputs(N, V, dtype=torch.float32, offset=0.0, seed=0):
    draw = torch.Generator().manual_seed(seed + N + V)
    logits = (3 * torch.randn(N, V, generator=draw) + offset).to(dtype)
    targets = torch.randint(V, (N,), generator=draw)
    targets[1:N:3] = sample.IGNORE
    return logits, targets, torch.randn(N, generator=draw), torch.randn(N, generator=draw)


def errors(function, logits, targets, temperature, g_logprob, g_entropy):
    """Errors of `function` (logits, targets, temperature) -> (logprob, entropy): forward values, then the gradient."""
    expected = reference(logits, targets, temperature, g_logprob, g_entropy)
    x = logits.detach().requires_grad_()
    logprob, entropy = function(x, targets, temperature)
    (logprob * g_logprob + entropy * g_entropy).sum().backward()
    return max(distance(logprob.detach(), expected[0]), distance(entropy.detach(), expected[1])), distance(x.grad, expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 2, 17, 1000, 4097, 32768])
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_logits_against_fp64(backend, V, temperature):
    """Catches a tail that is not masked, a temperature missing in one direction, int and block-edge mistakes."""
    function = lambda x, y, t: sample.logits_logprobs(x, y, temperature=t, backend=backend)
    for N in (0, 1, 7 if V > 5000 else 40):
        assert max(errors(function, *_with(temperature, inputs(N, V)))) <= 1e-5
        assert max(errors(function, *_with(temperature, inputs(N, V, torch.bfloat16)))) <= 1e-2


def _with(temperature, parts):
    logits, targets, g_logprob, g_entropy = parts
    return logits, targets, temperature, g_logprob, g_entropy


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("V", [1, 17, 1000, 4097, 151936])
def test_compiled_kernels_against_fp64(V):
    """Catches what the interpreter cannot show: a kernel that is right in Python and wrong once compiled."""
    function = lambda x, y, t: sample.logits_logprobs(x, y, temperature=t, backend="triton")
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        parts = [tensor.cuda() for tensor in inputs(7 if V > 5000 else 40, V, dtype)]
        assert max(errors(function, *_with(0.7, parts))) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_strides_and_infinities(backend):
    """Catches m + log d saved as one number, a slice copied whole or read with the wrong stride, and 0 * -inf."""
    function = lambda x, y, t: sample.logits_logprobs(x, y, temperature=t, backend=backend)
    logits, targets, g_logprob, g_entropy = inputs(24, 1000)
    shifted = logits + 1e4                                   # the rounding of x itself is part of the input, not of the error
    assert errors(function, shifted, targets, 1.0, g_logprob, g_entropy)[1] <= 1e-3
    block = torch.randn(3, 9, 40)
    view, labels = block[:, :-1, 3:36], torch.randint(33, (3, 8))
    assert max(errors(function, view, labels, 0.7, torch.randn(3, 8), torch.randn(3, 8))) <= 1e-5
    across = torch.randn(50, 6).T                            # last dimension not dense
    assert max(errors(function, across, torch.randint(50, (6,)), 0.7, torch.randn(6), torch.randn(6))) <= 1e-5
    assert max(errors(function, logits[::2], targets[::2], 0.7, g_logprob[::2], g_entropy[::2])) <= 1e-5
    cut = logits.clone()
    cut[:, 700:] = -torch.inf                                # a vocabulary padded with impossible tokens
    cut[0, :690] = -torch.inf
    low = torch.where(targets == sample.IGNORE, targets, targets % 10 + 690)
    x = cut.clone().requires_grad_()
    logprob, entropy = function(x, low, 1.0)
    (logprob * g_logprob + entropy * g_entropy).sum().backward()
    expected = reference(cut[:, :700].clone().clamp(min=-1e4), low, 1.0, g_logprob, g_entropy)
    assert max(distance(logprob.detach(), expected[0]), distance(entropy.detach(), expected[1]),
               distance(x.grad[:, :700], expected[2])) <= 1e-5 and not x.grad[:, 700:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sure_targets_keep_a_gradient(backend):
    """Catches onehot - p rounded to bf16 too early: a p of 0.999 becomes 1, and nothing is left to learn from."""
    logits, targets, g_logprob, g_entropy = inputs(12, 1000, torch.bfloat16)
    logits = logits / 3
    logits[torch.arange(12), targets.clamp(min=0)] = 14
    function = lambda x, y, t: sample.logits_logprobs(x, y, backend=backend)
    assert errors(function, logits, targets, 1.0, g_logprob, 0 * g_entropy)[1] <= 1e-2
    expected = reference(logits, targets, 1.0, g_logprob, 0 * g_entropy)[2]
    early = F.one_hot(targets.clamp(min=0), 1000) - torch.softmax(logits.float(), -1).bfloat16()
    assert distance(early * (g_logprob * (targets != sample.IGNORE))[:, None], expected) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_unless_overwrite(backend):
    """Catches a backward pass that destroys logits the caller still needs, and one that forgets it was allowed to."""
    logits, targets, g_logprob, g_entropy = inputs(9, 65)
    for overwrite in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1.0
        copy = x.detach().clone()
        logprob, entropy = sample.logits_logprobs(x, targets, backend=backend, overwrite=overwrite)
        (logprob * g_logprob + entropy * g_entropy).sum().backward()
        assert distance(leaf.grad, reference(logits, targets, 1.0, g_logprob, g_entropy)[2]) <= 1e-5
        assert torch.equal(x, copy) != overwrite


def linear_case(V, N, dtype=torch.float32, H=24):
    """hidden (N, H), weight (V, H), targets, and the two upstream gradients. Logits near 0.5: see test_linear_against_fp64."""
    draw = torch.Generator().manual_seed(V + N)
    hidden, weight = torch.randn(N, H, generator=draw).to(dtype), (0.1 * torch.randn(V, H, generator=draw)).to(dtype)
    _, *rest = inputs(N, V)
    return hidden, weight, *rest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_linear_against_fp64(backend, dtype, bound, temperature):
    """Catches a wrong chunk border, masked tokens that leak a gradient, and a head gradient summed over chunks in bf16.

    bf16: the logits are rounded to bf16 before the softmax (as the sampler's are), so they stay small here.
    """
    for V, N in ((1, 3), (2, 5), (17, 30), (1000, 41), (4097, 8), (32768, 3), (1000, 0), (1000, 1)):
        hidden, weight, targets, g_logprob, g_entropy = linear_case(V, N, dtype)
        g_entropy = g_entropy if dtype == torch.float32 else 0.1 * g_entropy
        h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
        logits = h64 @ w64.T
        expected = reference(logits, targets, temperature, g_logprob, g_entropy)
        logits.backward(expected[2])
        for chunk_bytes in (None, 7 * V * hidden.element_size()):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            logprob, entropy = sample.token_logprobs(h, w, targets, temperature=temperature, backend=backend, chunk_bytes=chunk_bytes)
            (logprob * g_logprob + entropy * g_entropy).sum().backward()
            assert logprob.dtype == entropy.dtype == torch.float32
            if V > 1:                                        # V = 1: log-prob, entropy and gradient are exactly 0
                assert distance(logprob.detach(), expected[0]) <= bound and distance(entropy.detach(), expected[1]) <= bound
                assert distance(h.grad, h64.grad) <= bound and distance(w.grad, w64.grad) <= bound
            assert not h.grad[targets == sample.IGNORE].any() and not logprob[targets == sample.IGNORE].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_sum_against_fp64(backend, dtype, bound):
    """Catches gradients made in the forward pass that miss a chunk, the mask, the temperature, or what comes from upstream."""
    for V, N in ((2, 5), (17, 30), (4097, 8), (1000, 0), (1000, 1)):
        hidden, weight, targets, _, _ = linear_case(V, N, dtype)
        h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
        kept = targets != sample.IGNORE
        expected = torch.log_softmax(h64 @ w64.T / 0.7, -1)[kept, targets[kept]].sum()
        (-0.3 * expected).backward()
        for chunk_bytes in (None, 7 * V * hidden.element_size()):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            total = sample.sum_logprob(h, w, targets, temperature=0.7, backend=backend, chunk_bytes=chunk_bytes)
            (-0.3 * total).backward()
            assert total.dtype == torch.float32 and total.shape == () and distance(total.detach(), expected.detach()) <= bound
            assert distance(h.grad, h64.grad) <= bound and distance(w.grad, w64.grad) <= bound
            assert not h.grad[~kept].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_takes_views_and_empty_masks(backend):
    """Catches strides that are ignored, and a batch without a single target (all prompt) that fails or gives no gradient."""
    block, wide = torch.randn(3, 9, 40, requires_grad=True), torch.randn(30, 77, requires_grad=True)
    hidden, weight = block[:, :-1, 3:33], wide.T[::2]        # neither is dense
    targets = torch.randint(39, (9, 3)).T[:, 1:]
    g_logprob, g_entropy = torch.randn(3, 8), torch.randn(3, 8)
    logits = hidden.detach().double() @ weight.detach().double().T
    expected = reference(logits, targets, 1.0, g_logprob, g_entropy)
    logprob, entropy = sample.token_logprobs(hidden, weight, targets, backend=backend)
    (logprob * g_logprob + entropy * g_entropy).sum().backward()
    assert max(distance(logprob.detach(), expected[0]), distance(entropy.detach(), expected[1])) <= 1e-5
    assert distance(block.grad[:, :-1, 3:33], expected[2] @ weight.detach().double()) <= 1e-5
    assert distance(wide.grad.T[::2], expected[2].flatten(0, 1).T @ hidden.detach().double().flatten(0, 1)) <= 1e-5
    for function in (sample.token_logprobs, sample.sum_logprob):
        block.grad = wide.grad = None
        result = function(hidden, weight, torch.full((3, 8), sample.IGNORE), backend=backend)
        total = result[0].sum() + result[1].sum() if isinstance(result, tuple) else result
        total.backward()
        assert total == 0 and not block.grad.any() and not wide.grad.any()


def test_one_output_or_one_input_is_enough():
    """Catches a backward pass that needs the entropy's gradient, or a frozen head that still costs one."""
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
    targets = torch.randint(11, (2, 5))
    logprob, _ = sample.token_logprobs(hidden, weight, targets)
    logprob.sum().backward()
    expected = torch.autograd.grad(torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[..., None]).sum(), hidden)[0]
    assert logprob.shape == (2, 5) and distance(hidden.grad, expected) <= 1e-5
    hidden.grad = None
    sample.token_logprobs(hidden, weight, targets)[1].sum().backward()
    p = torch.softmax(hidden @ weight.T, -1)
    assert distance(hidden.grad, torch.autograd.grad(-(p * p.log()).sum(), hidden)[0]) <= 1e-5
    hidden.grad = None
    sample.sum_logprob(hidden, weight, targets).backward()
    assert distance(hidden.grad, expected) <= 1e-5 and weight.grad is None
    weight.requires_grad_()
    sample.sum_logprob(hidden.detach(), weight, targets).backward()
    assert distance(weight.grad, (F.one_hot(targets, 11) - p).flatten(0, 1).T @ hidden.flatten(0, 1)) <= 1e-5
    with pytest.raises(ValueError, match="backend"):
        sample.token_logprobs(hidden, weight, targets, backend="cuda")


@pytest.mark.parametrize("loss", ["tokens", "sum"])
def test_whole_sft_step_equals_cross_entropy(loss):
    """Catches a loss that is close but not the model's: every parameter's gradient, against F.cross_entropy."""
    from test_sample import make_model
    model, ids = make_model("qwen2"), torch.randint(3, 160, (3, 20))
    targets = ids[:, 1:].clone()
    targets[:, :7] = sample.IGNORE
    F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden, head = model.model(ids).last_hidden_state[:, :-1], model.lm_head.weight
    total = sample.token_logprobs(hidden, head, targets)[0].sum() if loss == "tokens" else sample.sum_logprob(hidden, head, targets)
    (-total / (targets != sample.IGNORE).sum()).backward()
    assert max(distance(p.grad, expected[name]) for name, p in model.named_parameters()) <= 1e-5


# Wrong versions. Each takes (logits, targets, temperature) as above and must be rejected by the bound the right ones meet.
class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, fault):
        scale = 1 / temperature
        x = F.pad(logits, (0, 24)) if fault == "tail not masked" else logits
        logprob, entropy, m, log_d = sample.rows_forward(x, targets, scale).unbind(1)
        if fault == "x - (m + log d)":
            lse = m + log_d
            logprob = ((logits.float() * scale).gather(1, targets.clamp(min=0)[:, None])[:, 0] - lse).masked_fill(targets < 0, 0)
            m, log_d = lse, torch.zeros_like(lse)
        ctx.save_for_backward(logits, targets, torch.stack([logprob, entropy, m, log_d], 1))
        ctx.scale, ctx.fault = scale, fault
        return logprob.clone(), entropy.clone()

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        logits, targets, stats = ctx.saved_tensors
        if ctx.fault == "first token's upstream":
            g_logprob, g_entropy = g_logprob[:1].expand_as(g_logprob), g_entropy[:1].expand_as(g_entropy)
        if ctx.fault == "entropy's gradient dropped":
            g_entropy = torch.zeros_like(g_entropy)
        out = sample.rows_backward(logits, targets, stats, g_logprob, g_entropy, ctx.scale)
        if ctx.fault == "temperature forgotten in the backward":
            out /= ctx.scale
        return out, None, None, None


@pytest.mark.parametrize("fault", ["tail not masked", "first token's upstream", "entropy's gradient dropped",
                                   "temperature forgotten in the backward"])
def test_wrong_versions_are_rejected(fault):
    """Catches a check too loose to see the bugs it was written for (the right version passes it, first line)."""
    function = lambda fault: lambda x, y, t: Wrong.apply(x, y, t, fault)
    logits, *rest = inputs(40, 1000)
    request = _with(0.5, (0.2 * logits, *rest))              # flat logits: the 24 columns of an unmasked tail weigh something
    assert max(errors(function(None), *request)) <= 1e-5
    assert max(errors(function(fault), *request)) > 1e-3


def test_offset_rejects_the_joint_sum():
    """Catches x - (m + log d): with a common offset of 1e4 its gradient is 30 times further off than ours."""
    logits, targets, g_logprob, g_entropy = inputs(24, 1000, offset=1e4)
    ours = errors(lambda x, y, t: sample.logits_logprobs(x, y), logits, targets, 1.0, g_logprob, 0 * g_entropy)[1]
    joint = errors(lambda x, y, t: Wrong.apply(x, y, t, "x - (m + log d)"), logits, targets, 1.0, g_logprob, 0 * g_entropy)[1]
    assert ours <= 1e-6 and joint > 3e-5 and joint > 30 * ours


def test_bf16_accumulation_is_rejected():
    """Catches the head's gradient summed over chunks in bf16: 400 chunks of it lose more than the bound allows."""
    hidden = torch.rand(400, 16).bfloat16()
    weight = (0.1 * torch.randn(32, 16)).bfloat16()
    targets = torch.zeros(400, dtype=torch.int64)
    h64, w64 = hidden.double(), weight.double().requires_grad_()
    torch.log_softmax(h64 @ w64.T, -1)[:, 0].sum().backward()
    w = weight.clone().requires_grad_()
    sample.token_logprobs(hidden, w, targets, chunk_bytes=1)[0].sum().backward()
    total = torch.zeros_like(weight)
    for row in hidden:                                       # the wrong version: one token a chunk, bf16 running sum
        p = torch.softmax((row @ weight.T).float(), -1)
        total += (F.one_hot(targets[0], 32) - p).bfloat16()[:, None] * row
    assert distance(w.grad, w64.grad) <= 1e-2 < distance(total, w64.grad)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_triton_kernels_interpreted():
    """Runs the tests above with the Triton kernels on CPU tensors."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "triton"], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout[-3000:]


def compile_report(kernel, signature, constants, warps, capability):
    """(registers, stack bytes, shared bytes) of a kernel compiled for an NVIDIA GPU that need not be present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    compiled = triton.compile(ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton wheel brings no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK", "SHARED"))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spilling(capability, capsys):
    """Catches a kernel that compiles on no GPU, or whose block is so large that registers spill to the stack."""
    f, i = "*fp32", "*i64"
    for V in (100, 1000, 151936):
        block, warps = sample.launch_shape(V)
        for x in ("*bf16", "*fp32"):
            cases = {
                "forward": (sample._forward_kernel, [x, i, f, "i64", "i32", "fp32"], {"BLOCK": block}),
                "backward": (sample._backward_kernel, [x, i, f, f, f, x, "i64", "i64", "i32", "fp32"], {"BLOCK": block})}
            for name, (kernel, types, constants) in cases.items():
                signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants)))
                registers, stack, shared = compile_report(kernel, signature, constants, warps, capability)
                with capsys.disabled():
                    print(f"\nsm_{capability} {name:8} {x} BLOCK {block} warps {warps}: {registers} registers, {stack} stack, {shared} shared", end="")
                assert stack == 0
