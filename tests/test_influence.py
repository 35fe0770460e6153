"""eval.py: the influence of Proposition 3.1 against its own definition and against a real step; entropy; the
page."""
import copy
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import data, eval as evaluation, grpo, inject, sample


def sampled(policy, rewards, length=12, seed=0):
    """Rollouts that need not say anything: (groups, rewards (Q, N)) with the rewards wanted."""
    rng = torch.Generator().manual_seed(seed)
    vocabulary, rewards = len(policy.tokenizer), torch.tensor(rewards)
    prompts = torch.randint(0, vocabulary, (len(rewards), 9), generator=rng).tolist()
    groups = []
    for q, prompt in enumerate(prompts):
        lengths = torch.randint(2, length, (rewards.shape[1],), generator=rng).tolist()
        draw = lambda n: torch.randint(0, vocabulary, (n,), generator=rng).tolist()
        groups.append([(prompt[:5 + q % 4], draw(n)) for n in lengths])
    return groups, rewards


def log_prob(model, prompt, response, temperature=1.0):
    """log pi(o|q) from the logits of the whole sequence: the definition."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def per_rollout_gradients(policy, groups, temperature=1.0):
    """(Q, N, P): each rollout's own gradient."""
    def gradient(pair):
        value = log_prob(policy.model, *pair, temperature)
        parts = torch.autograd.grad(value, list(policy.model.parameters()))
        return torch.cat([part.flatten() for part in parts])
    return torch.stack([torch.stack([gradient(pair) for pair in group]) for group in groups])


def by_pairs(gradients, rewards, leave_one_out=False, std=True, root=True, sign=1, advantages=None):
    """dJ from all pairs K, as Proposition 3.1 writes it, query by query. The options make wrong versions."""
    Q, N, _ = gradients.shape
    K = torch.einsum("anp,bmp->anbm", gradients, gradients)  # (Q, N, Q, N)
    A = grpo.group_advantages(rewards, std=std).double() if advantages is None else advantages
    found = []
    for q in range(Q):
        others = [a for a in range(Q) if a != q or not leave_one_out]
        right, alpha = rewards[q] == 1, rewards[q].mean().item()
        if alpha in (0, 1):
            found.append(0.0)
            continue
        signal = math.sqrt(alpha * (1 - alpha)) if root else alpha
        pull = K[others, :, q][:, :, right].mean(2) - K[others, :, q][:, :, ~right].mean(2)  # (others, N)
        found.append(sign * signal * (A[others] * pull).mean().item())
    return torch.tensor(found)


def error(delta, truth):
    return ((delta - truth).norm() / truth.norm()).item()


REWARDS = [[1., 0., 0., 1.], [1., 1., 1., 1.], [0., 0., 1., 0.], [0., 0., 0., 0.], [1., 1., 0., 1.],
           [0., 1., 0., 0.]]


@pytest.fixture(scope="module")
def exact(tiny):
    """(policy in fp64, groups, rewards, the gradient of every rollout)."""
    policy = tiny()
    policy.model.double()
    groups, rewards = sampled(policy, REWARDS)
    return policy, groups, rewards, per_rollout_gradients(policy, groups)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_influence_is_the_sum_over_all_pairs(exact, leave_one_out):
    """Bugs: std forgotten in the advantages; alpha in place of sqrt(alpha (1 - alpha)); signs swapped; the
    advantages of another group; a query's own part left in, or taken out as if it were the whole; groups
    that are all right or all wrong not exactly 0."""
    policy, groups, rewards, gradients = exact
    before = [p.clone() for p in policy.model.parameters()]
    alpha, delta = evaluation.influence(policy, groups, rewards, leave_one_out=leave_one_out, micro_tokens=40)
    truth = by_pairs(gradients, rewards, leave_one_out)
    assert error(delta, truth) < 1e-4
    assert alpha.tolist() == [0.5, 1, 0.25, 0, 0.75, 0.25] and delta[1] == delta[3] == 0
    assert all(torch.equal(*pair) for pair in zip(before, policy.model.parameters()))
    rolled = grpo.group_advantages(rewards).roll(2, 0).double()
    for wrong in (dict(std=False), dict(root=False), dict(sign=-1), dict(advantages=rolled)):
        assert error(delta, by_pairs(gradients, rewards, leave_one_out, **wrong)) > 0.05
    assert error(delta, by_pairs(gradients, rewards, not leave_one_out)) > 0.05


def test_influence_is_a_slope(exact):
    """Bug: an inner product with something else than the direction in which the weights would move. Two
    forward passes, at the weights moved along G and against it, give every rollout's <grad log pi, G>."""
    policy, groups, rewards, gradients = exact
    A = grpo.group_advantages(rewards).double()
    G = torch.einsum("qn,qnp->p", A, gradients) / A.numel()
    model, slopes, eps = copy.deepcopy(policy.model), [], 1e-3 / G.norm()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for side in (eps, -eps):
        torch.nn.utils.vector_to_parameters(start + side * G, model.parameters())
        with torch.no_grad():
            slopes.append(torch.tensor([[log_prob(model, *pair) for pair in group] for group in groups]))
    slopes = (slopes[0] - slopes[1]) / (2 * eps)  # (Q, N)
    alpha, delta = evaluation.influence(policy, groups, rewards)
    centred = (rewards - alpha[:, None]) / (alpha * (1 - alpha)).sqrt().clamp(min=1e-9)[:, None]
    assert error(delta, (centred * slopes).mean(1)) < 1e-4


def test_influence_at_another_temperature_and_in_bf16(exact, tiny):
    """Bugs: log-probs at temperature 1 whatever is asked; gradients summed in 8 bits."""
    policy, groups, rewards, _ = exact
    truth = by_pairs(per_rollout_gradients(policy, groups, 0.7), rewards)
    assert error(evaluation.influence(policy, groups, rewards, temperature=0.7)[1], truth) < 1e-4
    small = tiny()
    small.model.bfloat16()
    rounded = copy.deepcopy(policy)
    rounded.model.load_state_dict(small.model.state_dict())
    truth = by_pairs(per_rollout_gradients(rounded, groups), rewards)
    assert error(evaluation.influence(small, groups, rewards)[1], truth) < 0.03


def test_random_projections_scatter_around_it(exact):
    """Bug: a constant factor off, which a correlation with the paper's estimate (gradients projected to 8,192
    dimensions) would not show. A projection is unbiased and its error falls as 1/sqrt(dimensions). 24
    gradients span 24 dimensions, and a Gaussian matrix looks the same from every basis: so it is enough to
    draw its 24 rows there. 20 draws each; their mean error is known to a few per cent."""
    policy, groups, rewards, gradients = exact
    delta, errors = evaluation.influence(policy, groups, rewards)[1], {}
    _, coordinates = torch.linalg.qr(gradients.flatten(0, 1).T)  # (24, 24): a column for each rollout
    rng, shape = torch.Generator().manual_seed(0), (*rewards.shape, -1)
    for d in (512, 2048, 8192):
        draws = [torch.randn(d, 24, generator=rng, dtype=torch.double) / math.sqrt(d) for _ in range(20)]
        estimates = [by_pairs((draw @ coordinates).T.reshape(shape), rewards) for draw in draws]
        errors[d] = sum(error(estimate, delta) for estimate in estimates) / 20
        assert error(sum(estimates) / 20, delta) < errors[d] / 2  # around it, not beside it
    assert errors[512] / errors[2048] == pytest.approx(2, rel=0.3)
    assert errors[2048] / errors[8192] == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("rewards, leave_one_out", [([[1., 0.]], True), ([[1., 0., 1.]], False)])
def test_influence_refuses_other_shapes(tiny, rewards, leave_one_out):
    """Bugs: division by zero where nothing is left out of one query; rewards of other rollouts."""
    groups, _ = sampled(tiny(), [[1., 0.]])
    with pytest.raises(ValueError):
        evaluation.influence(tiny(), groups, torch.tensor(rewards), leave_one_out=leave_one_out)


def one_step(policy, groups, rewards, lr):
    """A real step of plain gradient descent on the GRPO loss of these rollouts -> the policy after it."""
    after = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(after.model.parameters(), lr)
    advantages, rollouts = grpo.group_advantages(rewards).flatten(), sum(groups, [])
    for batch in evaluation.make_batches(after, rollouts, advantages, 4096):
        logprob, _ = batch.logprobs(after.model, 1.0)
        grpo.grpo_loss(logprob, logprob.detach(), None, batch.advantages, batch.mask, beta=0.0,
                       norm="constant", denom=len(rollouts)).backward()
    optimizer.step()
    return after


@torch.no_grad()
def log_probs(policy, groups):
    """log pi(o|q) of every rollout, (Q, N)."""
    rows = torch.arange(len(groups) * len(groups[0]))
    sums = torch.zeros(len(rows))
    for batch in evaluation.make_batches(policy, sum(groups, []), rows, 4096):
        sums[batch.advantages] = batch.logprobs(policy.model, 1.0)[0].sum(1)
    return sums.view(len(groups), -1)


def objective(log_probs, rewards):
    """(Q,): sqrt(alpha (1 - alpha)) (mean log pi of right rollouts - mean log pi of wrong ones)."""
    alpha = rewards.mean(1, keepdim=True)
    return ((rewards - alpha) / (alpha * (1 - alpha)).sqrt() * log_probs).mean(1)


def agree(predicted, gained, lr):
    """The measured changes follow the predicted ones: correlation at least 0.9, slope lr to 10%."""
    x, y = predicted - predicted.mean(), gained - gained.mean()
    return x @ y / x.norm() / y.norm() >= 0.9 and (x @ y / (x @ x)).item() == pytest.approx(lr, rel=0.1)


def test_prediction_and_a_real_step():
    """Bug: a formula that no step follows. 16 queries are trained on, 24 others are watched: each gains what
    was predicted for it. Their influence on each other is had from two calls, since in the pool of both, G is
    the mean of both parts' G. Shuffled rollouts fail. (Found: correlation 0.999999, slope 0.99996 lr. The
    statement holds for any reward; this one is soon earned: a first step in one of the wordings.)"""
    policy = sample.load_policy(sample.TINY_BASE.with_stem("base"))  # has read both wordings
    options = dict(ops=(2, 2), size=(2, 3), max_value=100, split="val")  # short prompts
    problems = [p for p, _ in zip(data.generate(**options), range(80))]
    prompts = [sample.encode_prompt(policy.tokenizer, p.question) for p in problems]
    rolled = sample.generate(policy, prompts, 4, max_new_tokens=16)
    rewards = torch.tensor([[float(sample.decode(policy.tokenizer, r.tokens).startswith("\n- Let"))
                             for r in group] for group in rolled])
    mixed = [q for q in range(80) if 0 < rewards[q].sum() < 4][:40]
    rewards, groups = rewards[mixed], [[(prompts[q], r.tokens) for r in rolled[q]] for q in mixed]
    trained, watched, lr = slice(0, 16), slice(16, 40), 1e-4
    pool = evaluation.influence(policy, groups, rewards)[1][watched]
    among = evaluation.influence(policy, groups[watched], rewards[watched])[1]
    predicted = (40 * pool - 24 * among) / 16
    after = one_step(policy, groups[trained], rewards[trained], lr)
    change = log_probs(after, groups[watched]) - log_probs(policy, groups[watched])  # (24, 4)
    assert len(predicted) == 24 and agree(predicted, objective(change, rewards[watched]), lr)
    assert not agree(predicted, objective(change.roll(1, 1), rewards[watched]), lr)  # within each group
    assert not agree(predicted, objective(change.roll(1, 0), rewards[watched]), lr)  # of another query


HOSTILE = "\n- Let <script>alert(1)</script> & \"x\" be the number of each.\n</think>\n<answer>\nno</answer>"


class Page(HTMLParser):
    """What a page refers to, and whether what it opens is closed."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.images = set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("details", "section", "div", "ol", "table"):
            self.open.append(tag)
        if tag == "img":
            assert dict(attributes)["alt"]

    def handle_endtag(self, tag):
        if tag in ("details", "section", "div", "ol", "table"):
            assert self.open.pop() == tag


def test_page(tiny, monkeypatch, tmp_path, script, tiny_file):
    """Bugs: what a model said becomes part of the page; a picture that is fetched from elsewhere; the first
    unsound line marked at another one; --json without what the page shows."""
    pytest.importorskip("matplotlib")
    problems = [p for p, _ in zip(data.generate(ops=(2, 4), max_value=100, split="test"), range(3))]
    injected = inject.inject(problems[0], problems[0].response, p=1.0)  # every behavior
    broken = problems[1].response.replace(" = ", " = 7 + ", 1)

    def generate(policy, prompts, n=1, *arguments, **options):
        texts = [[injected, HOSTILE], [broken, problems[1].response], [HOSTILE, HOSTILE]]
        encode = lambda text: sample.encode_response(policy.tokenizer, text)
        return [[SimpleNamespace(tokens=encode(t), logprobs=[], stop="eos") for t in group[:n]]
                for group in texts]
    monkeypatch.setattr(sample, "generate", generate)
    data.write_records(tmp_path / "<b>.jsonl", [data.to_record(p) for p in problems])
    (tmp_path / "policy.csv").write_text("step,reward,val_accuracy\n1,0.5,\n2,0.6,0.7\n")
    (tmp_path / "policy.pt").write_bytes(tiny_file.read_bytes())
    result = script("eval.py", "--ckpt", "policy.pt", tiny_file, "--data", "<b>.jsonl", "--samples", 2,
                    "--html", "x.html", "--json", "x.json", "--plot", "x.png")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.split("on others")[1].split("\n")[1:3]]
    assert [row[0] for row in rows] == ["policy.pt", str(tiny_file)]  # side by side
    text = (tmp_path / "x.html").read_text()
    page = Page(text)
    assert not page.open and "script" not in page.tags and "b" in page.tags
    assert "&lt;script&gt;" in text and "&lt;b&gt;.jsonl" in text and "<b>.jsonl" not in text
    assert len(page.links) == 5 and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not re.search("https?://", re.sub('src="[^"]*"', "", text))
    shown = [data.line_kind(line) for line in injected.split("\n")]
    assert {"reflection", "analysis"} < set(shown)
    assert all(text.count(f"<b>{kind}</b>") == 2 * shown.count(kind) for kind in set(shown) - {""})
    for number in (1, 2):  # of each problem, by both policies, which say the same
        assert text.count(f"<p>Rollout {number}: ") == 6
    fault = data.check_trace(problems[1], broken).error
    assert f"first fault ({fault.kind})" in re.search(r'<li class="[a-z ]*fault">.*?7 \+ .*?</li>', text)[0]
    split = json.load(open(tmp_path / "x.json"))["checkpoints"][0]["splits"]["<b>.jsonl"]
    assert split["influence"]["alpha"] == [0.5, 1.0, 0.0] and split["influence"]["delta"][1:] == [0, 0]
    assert split["influence"]["by_right"] == [0, split["influence"]["delta"][0], 0]
    assert split["entropy"] > 0 and split["perplexity"] > 1 and split["rollouts"]["shown"][2] == [
        HOSTILE, HOSTILE]


def test_a_base_was_fine_tuned_on_nothing(tiny):
    """Bug: answers injected at the base's unused --method and --p of None (a traceback after all sampling)."""
    policy = tiny()
    policy.info = {"model": "scratch", "method": "bridge", "behaviors": ["subgoal", "analysis"], "p": None,
                   "data": None, "n": 2000, "task": "igsm"}
    problems = list(itertools.islice(data.generate(ops=(2, 3), max_value=100, split="test"), 2))
    found = evaluation.measure_entropy(policy, problems, [([5, 6], [7, 8])], seed=3, micro_tokens=200)
    assert found["answers"] == "the problems' own" and found["perplexity"] > 1
    assert evaluation.origin(policy, "results/igsm.pt")[0] == "igsm"


def test_entropy_and_perplexity(tiny):
    """Bugs: a mean in place of the median; prompts counted in; the perplexity of plain answers for a policy
    that was fine-tuned on others; one that a file's answers were called by --method's default."""
    policy = tiny()
    problems = [p for p, _ in zip(data.generate(ops=(2, 3), max_value=100, split="test"), range(3))]
    policy.info = {"stage": "grpo", "base": {"stage": "sft", "method": "bridge", "p": 0.5, "data": None,
                                             "behaviors": ["subgoal", "analysis"]}}
    prompt, response = sample.encode_prompt(policy.tokenizer, problems[0].question), [5, 6, 7, 8, 9]
    found = evaluation.measure_entropy(policy, problems, [(prompt, response)], seed=3, micro_tokens=200)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    assert found["entropy"] == pytest.approx(torch.distributions.Categorical(logits=logits).entropy()
                                             .median().item(), rel=1e-5)
    assert found["answers"] == "subgoal+analysis-p0.5"
    total = tokens = 0
    for p in problems:
        (question, answer), = inject.augment(p, "bridge", ["subgoal", "analysis"], 0.5, seed=3)
        ids = sample.encode_response(policy.tokenizer, answer)
        with torch.no_grad():
            total += log_prob(policy.model, sample.encode_prompt(policy.tokenizer, question), ids).item()
        tokens += len(ids)
    assert found["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    # answers that cannot be injected: none, one with a line that is no step, one that is injected already
    injected = inject.inject(problems[1], problems[1].response, ("reflection",), 1)
    for response in ("", problems[1].response.replace("\n- ", "\n- first I add\n- ", 1), injected):
        others = [problems[0], replace(problems[1], response=response)]
        assert evaluation.sft_answers(policy, others, 3)[0] == "the problems' own"
    policy.info["base"]["data"] = "runs/mine-1.jsonl"
    assert evaluation.sft_answers(policy, problems, 3)[1][0] == (problems[0].question, problems[0].response)
