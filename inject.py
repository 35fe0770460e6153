"""Chapter 2. Behavior injection: edit the answers so that reinforcement learning has something to work with.

    python inject.py                                        # a plain answer beside its injected one
    python inject.py train.jsonl --method bridge --out bridge.jsonl

A policy gradient can only strengthen what the policy already does now and then. BRIDGE (arXiv 2505.18917,
Algorithm 1) therefore edits the answers that a model is fine-tuned on - same questions, same number of
examples - so that three behaviors appear in its rollouts:

    subgoal     exploitation   one arithmetic operation per "=":  13 + 5 + 6 = 18 + 6 = 24
    analysis    exploitation   restate the premise of a node before computing it
    reflection  exploration    start on a *locked* node (a parent is unsolved), say what is missing, go back

All three are defined on the problem's graph: an answer is a list of steps, each on one node, and a behavior
edits that list. How a step is worded is data.py's business; nothing here knows it.

Two baselines edit the same data without adding behaviors: PP-Aug shuffles the premises of the question and
RC-Aug walks the graph in another order; both make `--copies` examples of each, the original included.

Departures: the paper's text says once that a reflection names an unlocked node; as in its Algorithm 1 and
appendix, locked is meant. A reflection may fall on any locked node of the graph, needed or redundant.
"""
import argparse, re, sys
from random import Random

import data

BEHAVIORS = ("subgoal", "analysis", "reflection")


def inject(problem, response, behaviors=BEHAVIORS, p=0.1, rng=None):
    """Algorithm 1: the response with behaviors injected. Order and letters of its steps stay as they are.

    problem: with its graph (`problem.nodes`); behaviors: any of BEHAVIORS; p: the probability of an analysis and
    of a reflection at each step, one number or {"analysis": ..., "reflection": ...} (a subgoal is computed at
    every step); rng: a random.Random. Raises ValueError where the response is not a list of steps."""
    rng = rng or Random(0)
    p = p if isinstance(p, dict) else {"analysis": p, "reflection": p}
    steps = data.read_steps(problem, response)
    letters = {step.node: step.letter for step in steps}
    solved, injected = set(), []
    for step in steps:
        if "reflection" in behaviors and rng.random() < p["reflection"]:
            locked = [q for q, node in problem.nodes.items() if not solved.issuperset(node.parents)]
            if locked:
                injected.append(reflect(problem, rng.choice(locked), solved, letters, rng))
        analysis = "analysis" in behaviors and bool(problem.nodes[step.node].text) and rng.random() < p["analysis"]
        injected.append(step._replace(analysis=analysis, subgoal="subgoal" in behaviors))
        solved.add(step.node)
    return data.write_response(problem, injected)


def reflect(problem, node, solved, letters, rng):
    """A step that starts on a locked node and finds which of its parents are missing."""
    if node not in letters:  # a redundant node: it takes a letter of its own
        letters[node] = rng.choice([x for x in data.LETTERS if x not in letters.values()])
    missing = tuple(q for q in problem.nodes[node].parents if q not in solved)
    return data.open_step(problem, node, letters[node], rng)._replace(missing=missing)


def shuffle_premises(problem, rng):
    """PP-Aug: the same question with its premises in another order."""
    *premises, asked = problem.question.split("\n")
    return "\n".join(rng.sample(premises, len(premises)) + [asked])


def reorder_steps(problem, response, rng):
    """RC-Aug: the same answer with its steps in another topological order."""
    waiting, solved, order = data.read_steps(problem, response), set(), []
    while waiting:
        ready = [step for step in waiting if solved.issuperset(problem.nodes[step.node].parents)]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
        solved.add(order[-1].node)
    return data.write_response(problem, order)


def augment(problem, method, behaviors=BEHAVIORS, p=0.1, copies=4, seed=0):
    """The training examples that a method makes of one problem: a list of (question, response).

    method: "vanilla", "bridge", "pp-aug" or "rc-aug". The last two return up to `copies` distinct examples,
    the original first: fewer where the problem has fewer orders."""
    rng = Random(f"{seed} {problem.question}")  # a problem's edits do not depend on its place in the file
    if method == "vanilla":
        return [(problem.question, problem.response)]
    if method == "bridge":
        return [(problem.question, inject(problem, problem.response, behaviors, p, rng))]
    examples = [(problem.question, problem.response)]
    for _ in range(20 * copies):
        if len(examples) >= copies:
            break
        copy = ((shuffle_premises(problem, rng), problem.response) if method == "pp-aug"
                else (problem.question, reorder_steps(problem, problem.response, rng)))
        if copy not in examples:
            examples.append(copy)
    return examples


def mark(before, after):
    """The injected answer with what was added set between [ ] (whole lines and insertions within a line)."""
    plain = before.split("\n")
    lines = []
    for line in after.split("\n"):
        same = next((x for x in plain if line.startswith(x.split(". ")[0]) and x.split(". ")[0]), None)
        if line in plain or same is None:
            lines.append(line if line in plain else f"[{line}]")
            continue
        head = 0
        while head < min(len(line), len(same)) and line[head] == same[head]:
            head += 1
        tail = 0
        while tail < min(len(line), len(same)) - head and line[-1 - tail] == same[-1 - tail]:
            tail += 1
        lines.append(f"{line[:head]}[{line[head:len(line) - tail]}]{line[len(line) - tail:]}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", nargs="?", help="JSONL of problems with plain answers; without it one problem is shown")
    parser.add_argument("--method", choices=["vanilla", "bridge", "pp-aug", "rc-aug"], default="bridge")
    parser.add_argument("--behaviors", nargs="*", choices=BEHAVIORS, default=BEHAVIORS, help="which behaviors bridge injects")
    parser.add_argument("--p", type=float, default=0.1, help="probability of an analysis and of a reflection, a step")
    parser.add_argument("--p-analysis", type=float, help="the same for analyses alone")
    parser.add_argument("--p-reflection", type=float, help="the same for reflections alone")
    parser.add_argument("--copies", type=int, default=4, help="examples a problem with pp-aug and rc-aug, the original included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSONL file to write")
    args = parser.parse_args()
    p = {"analysis": args.p if args.p_analysis is None else args.p_analysis,
         "reflection": args.p if args.p_reflection is None else args.p_reflection}
    if not all(0 <= x <= 1 for x in p.values()) or args.copies < 1:
        raise data.InputError("--p must lie in 0 ... 1 and --copies be at least 1")
    options = dict(behaviors=args.behaviors, p=p, copies=args.copies, seed=args.seed)
    if args.file is None:
        problem = next(data.generate(ops=(7, 7), seed=args.seed, max_value=100))
        _, response = augment(problem, "bridge", **options | {"p": p if args.p != 0.1 else 0.4})[0]
        print(f"{problem.question}\n\n--- plain\n{problem.response}\n\n--- injected, in [ ] (here with p = 0.4)\n"
              f"{mark(problem.response, response)}")
        return
    if not args.out:
        raise data.InputError("--out is missing: name the JSONL file to write")
    problems = data.read_problems(args.file, graph=True)
    counts = {"examples": 0, "steps": 0, "reflections": 0, "analyses": 0, "subgoals": 0}

    def records():
        for problem in problems:
            try:
                examples = augment(problem, args.method, **options)
            except ValueError as error:
                raise data.InputError(f"{args.file}, problem {problem.id}: {error}") from None
            for question, response in examples:
                report = data.check_trace(problem, response)
                if not report.ok:
                    raise data.InputError(f"{args.file}, problem {problem.id}: its answer does not hold: {report.error}")
                counts["examples"] += 1
                for name in list(counts)[1:]:
                    counts[name] += getattr(report, name)
                yield data.to_record(problem) | {"id": counts["examples"] - 1, "question": question, "response": response}

    data.write_records(args.out, records())
    print(", ".join(f"{count} {name}" for name, count in counts.items()) + f" from {len(problems)} problems")


if __name__ == "__main__":
    data.run_cli(main)
