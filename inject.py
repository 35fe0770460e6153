"""Chapter 2. Behavior injection: edit the answers so that reinforcement learning has something to work with.

    python inject.py                                        # a plain answer beside its injected one
    python inject.py train.jsonl --method bridge --out bridge.jsonl        # or vanilla, pp-aug, rc-aug

The words of reinforcement learning: the language model is the *policy*, since its probabilities decide which
token comes next. An answer drawn from them token by token is a *rollout*; its *reward* is 1 if it is right,
else 0. A question gets several rollouts, and the *advantage* of each is its reward less their mean. The
*policy gradient* is the change of weights that makes rollouts of positive advantage more probable and those
of negative advantage less.

So it can only strengthen what the policy already does now and then. BRIDGE (arXiv 2505.18917, Algorithm 1)
therefore edits the answers that a model is fine-tuned on beforehand - same questions, same number of examples
- so that three behaviors appear in its rollouts:

    subgoal     exploitation   one arithmetic operation per "=":  13 + 5 + 6 = 18 + 6 = 24
    analysis    exploitation   restate the premise of a node before computing it
    reflection  exploration    start on a *locked* node (a parent is unsolved), say what is missing, go back

All three are defined on the problem's graph: an answer is a list of steps, each on one node, and a behavior
edits that list. How a step is worded is data.py's business; nothing here knows it. Twenty minutes to read; at
first skip what `official` and `near` switch on.

Two baselines edit the same data without adding behaviors: PP-Aug shuffles the premises of the question and
RC-Aug walks the graph in another order; both make `--copies` examples of each, the original included.

Departures: the paper's text says once that a reflection names an unlocked node; as in its Algorithm 1 and
appendix, locked is meant. A reflection may fall on any locked node of the graph, needed or redundant.
The released code departs from the paper twice, and --official follows it: (1) a reflection draws any later
node, needed (70%) or redundant (30%), and solves it early if it happens to be unlocked; (2) the probability
of an analysis depends on the in-degree alone (.1, .4, .8, 1 for 1 to 4; 0 for a given value), and a
reflection can carry one. A constant in the premise counts as one in-degree: so we find it in its records.
"""
from random import Random

import data

# ------------------------------------------------------------------------------------------- 1. The behaviors
BEHAVIORS = ("subgoal", "analysis", "reflection")
OFFICIAL_ANALYSIS = (0, 0.1, 0.4, 0.8, 1)  # the released code's probability for in-degree 0, 1, 2, 3, 4


def inject(problem, response, behaviors=BEHAVIORS, p=0.1, rng=None, official=False, near=0.0):
    """Algorithm 1: the response with behaviors injected. Its steps keep their order (not so with `official`)
    and their letters (in the tidy wording, data.in_order, they are given anew in order of appearance).

    problem: with its graph (`problem.nodes`); behaviors: any of BEHAVIORS; p: the probability of an analysis
    and of a reflection at each step, one number or {"analysis": ..., "reflection": ...} (a subgoal is
    computed at every step); rng: a random.Random; official: as the released code does it (see the top);
    near: the share of reflections on a node that waits for this very step, so that what is missing is solved
    next (none in the paper; half of them in what sft.py's base reads). Raises ValueError where the response
    is not a list of steps."""
    rng = rng or Random(0)
    p = p if isinstance(p, dict) else {"analysis": p, "reflection": p}
    steps = data.read_steps(problem, response)
    letters = {step.node: step.letter for step in steps}
    solved, injected = set(), []

    def write(step):
        node, chance = problem.nodes[step.node], p["analysis"]
        if official:  # for it, a given value has in-degree 0
            chance = OFFICIAL_ANALYSIS[min(node.degree, 4) if node.parents else 0]
        possible = "analysis" in behaviors and node.text and (official or not step.missing)
        analysis = node.text if possible and rng.random() < chance else ""
        injected.append(step._replace(analysis=analysis, subgoal="subgoal" in behaviors))
        if not step.missing:
            solved.add(step.node)

    for step in steps:
        if step.node in solved:  # the released code may have solved it early
            continue
        if "reflection" in behaviors and rng.random() < p["reflection"]:
            if detour := take_detour(problem, step, solved, letters, rng, official, near):
                write(detour)
        write(step)
    return data.write_response(problem, data.worded_like(steps, injected))


def locked_nodes(nodes, solved):
    """Names of the locked nodes, in the order of `nodes`. nodes: name -> Node; solved: a set of names."""
    return [name for name, node in nodes.items() if not solved.issuperset(node.parents)]


def reflect(problem, node, letter, solved, rng):
    """A step that opens on a node and names its parents that are missing; if none is, the step solves it."""
    missing = tuple(parent for parent in problem.nodes[node].parents if parent not in solved)
    return data.open_step(problem, node, letter, rng)._replace(missing=missing)


def take_detour(problem, step, solved, letters, rng, official=False, near=0.0):
    """A reflection on a locked node, with a letter of its own if it has none; None where no node is locked.

    official: on any node that is not solved, 70% one that the answer needs and 30% one that it does not; if
    all its parents are solved, the step solves it; near: see inject."""
    if official:
        needed, want_needed = data.needed_nodes(problem.nodes, problem.target), rng.random() < 0.7
        nodes = [q for q in problem.nodes
                 if q not in solved and q != step.node and (q in needed) == want_needed]
    else:
        nodes = locked_nodes(problem.nodes, solved)
        if near and rng.random() < near:  # without `near` no draw more: the paper's edits stay as they are
            nodes = [q for q in nodes if step.node in problem.nodes[q].parents] or nodes
    if not nodes:
        return None
    node = rng.choice(nodes)
    letter = letters.get(node) or data.new_letter(problem, node, letters.values(), rng)
    if letter is None:
        return None
    letters[node] = letter
    return reflect(problem, node, letter, solved, rng)


# -------------------------------------------------- 2. Two baselines, and the examples that each method makes
def shuffle_premises(problem, rng):
    """PP-Aug: the same question with its premises in another order."""
    *premises, asked = problem.question.strip("\n").split("\n")
    return "\n".join(rng.sample(premises, len(premises)) + [asked])


def reorder_steps(problem, response, rng):
    """RC-Aug: the same answer with its steps in another topological order."""
    steps, solved, order = data.read_steps(problem, response), set(), []
    waiting = list(steps)
    while waiting:
        ready = [step for step in waiting if solved.issuperset(problem.nodes[step.node].parents)]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
        solved.add(order[-1].node)
    return data.write_response(problem, data.worded_like(steps, order))


def augment(problem, method, behaviors=BEHAVIORS, p=0.1, copies=4, seed=0, official=False):
    """The training examples that a method makes of one problem: a list of (question, response).

    method: "vanilla", "bridge", "pp-aug" or "rc-aug". The last two return up to `copies` distinct examples,
    the original first: fewer where the problem has fewer orders."""
    rng = Random(f"{seed} {problem.question}")  # a problem's edits do not depend on its place in the file
    if method == "vanilla":
        return [(problem.question, problem.response)]
    if method == "bridge":
        return [(problem.question, inject(problem, problem.response, behaviors, p, rng, official))]
    examples = [(problem.question, problem.response)]
    for _ in range(20 * copies):
        if len(examples) >= copies:
            break
        if method == "pp-aug":
            copy = (shuffle_premises(problem, rng), problem.response)
        else:
            copy = (problem.question, reorder_steps(problem, problem.response, rng))
        if copy not in examples:
            examples.append(copy)
    return examples


# ----------------------------------------------------------------------- 3. Showing, writing, and the command
def mark(before, after):
    """The injected answer with what was added to the plain one set between [ ].

    >>> print(mark("Let x be it. So x = 9.", "Let y be that. But y waits.\\nLet x be it. So x = 9 - 0 = 9."))
    [Let y be that. But y waits.]
    Let x be it. So x = [9 - 0 =] 9.
    """
    plain, lines = before.split("\n"), []
    for line in after.split("\n"):
        lines.append(f"[{line}]")  # a new one, unless it holds all words of a plain line
        for old in plain:
            words, rest = [], old.split(" ")
            for word in line.split(" "):  # a word that is not the plain line's next one was added
                words.append(rest.pop(0) if rest and word == rest[0] else f"[{word}]")
            if not rest:
                plain.remove(old)
                lines[-1] = " ".join(words).replace("] [", " ")
                break
    return "\n".join(lines)


def is_plain(problem):
    """Whether a problem has its graph and a sound answer without reflections, analyses and redundant steps:
    what `augment` takes."""
    report = data.check_trace(problem, problem.response)
    more = report.reflections or report.analyses or report.redundant
    return bool(problem.nodes) and report.ok and not more


def make_records(problems, path, method, options, counts):
    """The JSON records of all examples, each checked; `counts` adds up what they hold."""
    def checked(problem, response):
        report = data.check_trace(problem, response)
        if not report.ok:
            line, kind, reason, _ = report.error
            raise data.InputError(f"{path}, problem {problem.id}: its answer does not hold, line {line}: "
                                  f"{reason} ({kind})")
        return report

    for problem in problems:
        plain = checked(problem, problem.response)
        if method in ("bridge", "rc-aug") and (plain.reflections or plain.analyses):
            raise data.InputError(f"{path}, problem {problem.id}: its answer holds behaviors already; give "
                                  "plain answers")
        if method == "rc-aug" and plain.redundant:
            raise data.InputError(f"{path}, problem {problem.id}: its answer has a step that the question "
                                  "does not need, which could end up last; give plain answers")
        for question, response in augment(problem, method, **options):
            report = checked(problem, response)
            example = {"id": counts["examples"], "question": question, "response": response}
            yield data.to_record(problem) | example
            counts["examples"] += 1
            for name in ("steps", "reflections", "analyses", "subgoals"):
                counts[name] += getattr(report, name)


def add_flags(parser):
    add = parser.add_argument
    add("file", nargs="?", help="JSONL of problems with plain answers; without it one problem is shown")
    add("--method", choices=["vanilla", "bridge", "pp-aug", "rc-aug"], default="bridge")
    add("--behaviors", nargs="*", choices=BEHAVIORS, default=BEHAVIORS, help="which behaviors bridge injects")
    add("--p", type=data.share,
        help="probability of an analysis and of a reflection, a step; default: 0.1 (without a file: 0.4)")
    add("--p-analysis", type=data.share, help="the same for analyses alone")
    add("--p-reflection", type=data.share, help="the same for reflections alone")
    add("--official", action="store_true", help="reflections and analyses as the released code draws them")
    add("--copies", type=data.number(int, 1, 1000, "a whole number from 1 to 1000"), default=4,
        help="examples a problem with pp-aug and rc-aug, with the original")
    add("--seed", type=data.natural, help="default: 0 (without a file: 5)")
    add("--out", help="JSONL file to write")


def check(args, parser):
    """Refuse flags that would have no effect, each in one sentence."""
    if not args.file:
        parser.refuse(args, ("method", "copies", "out"), "without a file to read")
    if args.method != "bridge":
        parser.refuse(args, ("behaviors", "p", "p_analysis", "p_reflection", "official"),
                      f"with --method {args.method}")
    behaviors = f"with --behaviors {' '.join(args.behaviors) or 'and none named'}"
    drawn = [name for name in ("analysis", "reflection") if name in args.behaviors]
    for name in {"analysis", "reflection"}.difference(drawn):
        parser.refuse(args, (f"p_{name}",), behaviors)
    if not drawn:
        parser.refuse(args, ("p", "official"), behaviors)
        parser.refuse(args, ("seed",) if args.file and args.method == "bridge" else (), behaviors)
    own = [f"p_{name}" for name in drawn if name == "reflection" or not args.official]  # who else needs --p?
    if own and all(getattr(args, name) is not None for name in own):
        parser.refuse(args, ("p",), "with " + " and ".join(f"--{name.replace('_', '-')}" for name in own))
    if args.official:
        parser.refuse(args, ("p_analysis",), "with --official, where the in-degree decides")
        if drawn == ["analysis"]:
            parser.refuse(args, ("p",), "with --official and without reflections: the in-degree decides")
    if args.method == "vanilla":
        parser.refuse(args, ("seed",), "with --method vanilla")
    if args.method in ("vanilla", "bridge"):
        parser.refuse(args, ("copies",), f"with --method {args.method}")


def main():
    parser = data.Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args()
    check(args, parser)
    if args.seed is None:
        args.seed = 0 if args.file else 5
    both = args.p if args.p is not None else 0.1 if args.file else 0.4
    p = {"analysis": both if args.p_analysis is None else args.p_analysis,
         "reflection": both if args.p_reflection is None else args.p_reflection}
    options = dict(behaviors=args.behaviors, p=p, copies=args.copies, seed=args.seed, official=args.official)
    if args.file is None:
        problem = next(data.generate(ops=(7, 7), seed=args.seed, max_value=100))
        (_, response), = augment(problem, "bridge", **options)
        rates = [f"{x:g} for {name}" for name, x in p.items() if name == "reflection" or not args.official]
        print(f"{problem.question}\n\n--- plain\n{problem.response}\n\n"
              f"--- injected, in [ ] (p = {', '.join(rates)})\n{mark(problem.response, response)}")
        return
    if not args.out:
        raise data.InputError("--out is missing: name the JSONL file to write")
    data.claim([("--out", args.out, data.RECORD)], [("the file to read", args.file)])
    problems = data.read_problems(args.file, graph=True)
    counts = {"examples": 0, "steps": 0, "reflections": 0, "analyses": 0, "subgoals": 0}
    data.write_records(args.out, make_records(problems, args.file, args.method, options, counts))
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f" from {len(problems)} problems")


if __name__ == "__main__":
    data.run_cli(main)
