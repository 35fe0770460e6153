"""Problems and the checker: what a wrong generator, reader, executor or reward would do, and that it is seen.

BRIDGE_FULL=1 runs the same tests over 20,000 problems a setting (200 a corruption, 200,000 random endings)
and prints the figures; with -s they are shown."""
import doctest, hashlib, json, os, random, re, signal, time
from collections import Counter
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import pytest

import data, inject

FULL = bool(os.environ.get("BRIDGE_FULL"))
REFERENCE = Path(__file__).parent.parent.parent / "shared/reference/igsm_official.jsonl"
SETTINGS = {"ops 2-5": dict(ops=(2, 5)), "ops 15-20": dict(ops=(15, 20)), "ops 20": dict(ops=(20, 20)),
            "ops 25": dict(ops=(25, 25)),
            "depth 4": dict(task="promptbench", depth=4), "depth 5": dict(task="promptbench", depth=5),
            "depth 5, 20-22": dict(task="promptbench", depth=5, redundancy=(20, 22))}


@pytest.fixture
def script(process):
    """As conftest's, but in a process of its own: data.py and inject.py start in a moment."""
    def run(name, *arguments):
        running = process(name, *arguments)
        stdout, stderr = running.communicate(timeout=600)
        return SimpleNamespace(returncode=running.returncode, stdout=stdout, stderr=stderr)
    return run


def problems(n, **options):
    return list(islice(data.generate(**options), n))


def test_doctests():
    """The examples in the docstrings are real output, the picture at the top of data.py among them."""
    result = doctest.testmod(data)
    assert data.__doc__.count(">>>") and result.attempted >= 3 and result.failed == 0


# ------------------------------------------------------------------------------------------ problems
def answer_from_text(question, categories):
    """The answer by definition, sharing no code with data.py: recursion over the words of the question."""
    *lines, asked = question.split("\n")
    if asked.startswith("What"):
        facts = {words[3 if words[0] == "The" else 0]: words
                 for words in (line.rstrip(".").split() for line in lines)}

        def value(name):
            words = facts[name]
            a, b = ([value(x) for x in words[6:] if x in facts] + [0, 0])[:2]
            if words[1] != "gets":
                return int(words[5])
            return {"adding": a + b, "multiplying": a * b, "subtracting": b - a, "squaring": a * a}[words[5]]
        return value(asked[len("What is the value of "):-1])
    facts = dict(re.fullmatch(r"The number of (each .+) equals (.+)\.", line).groups() for line in lines)
    layers = list(categories.items())

    def value(name):
        if name not in facts:  # implied: a sum over the owner's children, one layer down
            owner, category = name[len("each "):].split("'s ")
            level = next(i for i, (_, items) in enumerate(layers) if owner in items)
            below, children = layers[level - 1]
            children = [y for y in children if f"each {owner}'s {y}" in facts]
            assert children
            return sum(value(f"each {owner}'s {y}")
                       * (1 if below == category else value(f"each {y}'s {category}")) for y in children)
        text = facts[name]
        parts = [value(x) for x in re.findall(r"each .+?'s .+?(?=,| and |$)", text)]
        total = parts[0] - parts[1] if "difference" in text else sum(parts)
        constant = int(re.match(r"\d+|", text)[0] or 0)
        return constant * total if " times " in text else constant + total
    owner = re.fullmatch(r"How many (.+) does each (.+) have\?", asked)
    return value(f"each {owner[2]}'s {owner[1]}")


@pytest.mark.parametrize("name", SETTINGS)
def test_problems_are_what_they_say(name):
    """An ill-posed, duplicate or mislabelled problem, a graph that the text does not hold, a wrong sum."""
    options, n = SETTINGS[name], 20_000 if FULL else 400
    seen, redundant, implied = set(), 0, 0
    for problem in islice(data.generate(seed=5, **options), n):
        read = data.read_question(problem.question, problem.categories)
        for name in ("nodes", "target", "task", "ops"):
            assert getattr(read, name) == getattr(problem, name)
        assert read.answer == problem.answer == answer_from_text(problem.question, problem.categories)
        report = data.check_trace(read, problem.response)
        needed = data.needed_nodes(problem.nodes, problem.target)
        assert report.ok and report.steps == len(needed)
        assert report.redundant == report.reflections == report.analyses == 0
        assert abs(problem.answer) < 1000 and data.split_of(problem.question) == "train"
        if problem.task == "igsm":
            low, high = options["ops"]
            assert low <= problem.ops <= high
            assert problem.ops == sum(
                max(1, len(re.findall(r"each |\d+", node.text)) - 1) if node.text else node.operations
                for node in map(problem.nodes.get, needed))
        again = data.from_record(json.loads(json.dumps(data.to_record(problem))), graph=True)
        again.ops = problem.ops  # PromptBench's records do not hold it
        assert again == problem
        *premises, asked = problem.question.split("\n")
        seen.add("\n".join(sorted(premises) + [asked]))
        redundant += len(problem.nodes) > len(needed)
        implied += any(not problem.nodes[q].text for q in needed)
    print(f"\n{name}: {n} problems, {len(seen)} distinct, redundant premise in {redundant / n:.1%}, "
          f"implied quantity in {implied / n:.1%}")
    assert len(seen) == n
    if name == "ops 15-20":
        assert .25 <= redundant / n and .25 <= implied / n


def test_a_graph_is_read_where_it_is_needed():
    """A crash, or a sound answer refused, for problems from a file that were read without their graphs."""
    for problem in [*problems(5, ops=(3, 12)), *problems(5, task="promptbench")]:
        bare = data.from_record(data.to_record(problem))
        assert bare.nodes == {}
        assert data.check_trace(bare, problem.response) == data.check_trace(problem, problem.response)
    foreign = data.from_record({"question": "What is 6 times 9?", "answer": 42})
    assert "cannot be read" in data.check_trace(foreign, "<think>").error.reason


def test_our_names_need_no_categories():
    """A question in our own words that can only be read with its record."""
    for problem in problems(30, ops=(3, 12)):
        read = data.read_question(problem.question)  # an implied quantity's summands may be in another order
        assert (read.answer, read.ops, set(read.nodes)) == (problem.answer, problem.ops, set(problem.nodes))


@pytest.mark.parametrize("ops", [(1, 1), (1, 2), (30, 30)])
def test_ends_of_the_range(ops):
    """A crash where the released generator crashes: small structures; and at the other end."""
    for p in problems(20, ops=ops):
        assert ops[0] <= p.ops <= ops[1] and data.check_trace(p, p.response).ok


@pytest.mark.skipif(not REFERENCE.exists(), reason="the released generator's records are not here")
def test_released_records():
    """A reader that understands our own texts alone; an ill-posed question that it answers all the same."""
    refused, passed = [], 0
    for number, line in enumerate(REFERENCE.read_text().splitlines(), 1):
        record = json.loads(line)
        try:
            problem = data.from_record(record, graph=True)
        except ValueError as error:
            refused.append(str(error))
            continue
        read = data.read_question(problem.question, problem.categories)
        assert (read.answer, read.ops) == (record["answer"], record["ops"])
        report = data.check_trace(problem, problem.response)
        assert report.ok, (number, report)
        passed += 1
        rewritten = data.write_response(problem, data.read_steps(problem, problem.response))
        again = data.check_trace(problem, rewritten)
        assert again.ok and again.steps == report.steps
        assert (again.reflections, again.analyses) == (report.reflections, report.analyses)
    assert passed == 299 and len(refused) == 1
    assert "'each Kid's Animal Farm' is neither described nor implied" in refused[0]


FARM = """The number of each Tall Barn's Tin Crate equals 5 more than each Old Barn's Crate.
The number of each Old Barn's Tin Crate equals 2.
The number of each Old Barn's Pine Crate equals \
the sum of each Old Barn's Tin Crate and each Old Barn's Tin Crate.
How many Tin Crate does each Tall Barn have?"""
BENCH = """The value of aab is 5.
aac gets its value by subtracting the value of aab from the value of aad.
The value of aad is 2.
What is the value of aac?"""


@pytest.mark.parametrize("text, old, new, line", [
    (FARM, "equals 2.", "equals 2", 2), (FARM, "equals 2.", "equals 2 each Tall Barn's Tin Crate.", 2),
    (FARM, "5 more than each Old Barn's Crate", "5 more than", 1), (FARM, "5 more than", "5 less than", 1),
    (FARM, "5 more than", "05 more than", 1), (FARM, "5 more", "٥ more", 1),
    (FARM, "5 more", "5" * 5000 + " more", 1),
    (FARM, "sum of each Old Barn's Tin Crate and",
     "difference of each Old Barn's Pine Crate, each Old Barn's Tin Crate and", 3),
    (FARM, "the sum of each Old Barn's Tin Crate and", "the sum of", 3),
    (FARM, "Old Barn's Pine", "Old Barn's Tin", 3),
    (FARM, "Old Barn's Crate", "Tin Crate's Old Barn", 1),
    (FARM, "equals 2", "equals each Tall Barn's Tin Crate", 4),
    (FARM, "each Tall Barn have", "each Round Barn have", 4), (FARM, "How many", "How much", 4),
    (BENCH, "is 5", "is five", 1), (BENCH, "aab from", "aaf from", 2), (BENCH, "aad is 2", "aab is 2", 3),
    (BENCH, "value of aac?", "value of aaz?", 4),
    (BENCH, "is 2.", "is 2.5.", 3), (BENCH, "aab is 5", "aad is 5", 3)])
def test_broken_questions_are_refused(text, old, new, line):
    """An answer to a question that breaks the grammar, contradicts itself, is circular or leaves a gap."""
    assert data.read_question(text).answer in (11, -3)
    broken = text.replace(old, new, 1)
    assert broken != text
    with pytest.raises(ValueError, match=f"^line {line}: "):
        data.read_question(broken)


def test_monsters_are_refused():
    """A file of squares of squares takes for ever, or ends in a traceback of int()."""
    names = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    lines = [f"{b} gets its value by squaring the value that {a} has." for a, b in zip(names, names[1:])]
    with pytest.raises(ValueError, match="beyond 10"):
        data.read_question("\n".join(["The value of aa is 3.", *lines, "What is the value of ab?"]))


def chain(n):
    """A question of n quantities, each computed from the one before it."""
    names = ["".join(letters) for letters in product("abcdefgh", repeat=3)][:n]
    lines = [f"{b} gets its value by adding together the value of {a} and {names[0]}."
             for a, b in zip(names, names[1:])]
    return "\n".join([f"The value of {names[0]} is 1.", *lines, f"What is the value of {names[-1]}?"])


def tower(n):
    """A question over n layers of one item each: what it asks for rests on n - 3 other implied quantities."""
    lines = [f"The number of each L{i + 1}'s L{i} equals 1." for i in range(n - 1)]
    question = "\n".join([*lines, f"How many C0 does each L{n - 1} have?"])
    return question, {f"C{i}": [f"L{i}"] for i in range(n)}


def fan(n):
    """A question in which one quantity is the sum of n others."""
    names = [f"each B's A{i}" for i in range(n)]
    lines = [f"The number of {name} equals 1." for name in names]
    lines.append(f"The number of each C's B equals the sum of {data.listed(names)}.")
    categories = {"As": [f"A{i}" for i in range(n)], "Bs": ["B"], "Cs": ["C"]}
    return "\n".join([*lines, "How many B does each C have?"]), categories


def test_large_questions():
    """A traceback where a question is deeper than Python can recurse; a bound that refuses too much."""
    deepest, widest = (chain(data.MOST_NODES),), fan(data.MOST_PARENTS)
    for question, answer in ((deepest, 400), (tower(200), 1), (widest, 100)):
        problem = data.read_question(*question)
        assert problem.answer == answer and data.draw_picture(problem)
    for question in ((chain(data.MOST_NODES + 1),), tower(202), tower(400), fan(data.MOST_PARENTS + 1)):
        with pytest.raises(ValueError, match="^line [0-9]+: over 400 quantities, or one .* from over 100$"):
            data.read_question(*question)


@pytest.mark.parametrize("flags, digest", [
    (("--ops", "15", "20"), "9f2dbd89e568d63d"), (("--task", "promptbench", "--depth", "4"), "3a20d1e0bac0e8ab")])
def test_same_seed_same_bytes(flags, digest, script, tmp_path, monkeypatch):
    """A draw that depends on the workers, on the hash seed of Python, or on the version of this file."""
    for workers, hash_seed in [(1, "0"), (2, "1")]:
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        done = script("data.py", *flags, "--n", 150, "--seed", 100, "--workers", workers,
                      "--out", "out.jsonl")
        assert done.returncode == 0 and "150 problems" in done.stdout and "duplicates dropped" in done.stdout
        assert hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("task", list(data.TINY))
def test_the_tiny_problems_as_flags(task):
    """Bugs: --help names other flags than the defaults; an option that is given loses against the tiny
    model's; the tiny model's options mixed into problems whose size was asked for; a flag of the other task
    that is dropped without a word."""
    def options(*flags):
        parser = data.Parser("")
        data.add_problem_flags(parser)
        return data.problem_options(parser.parse_args(["--task", task, *flags]))
    tiny = {"task": task} | data.TINY[task]
    spelled = options(*data.as_flags(data.TINY[task]).split())
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in spelled.items()} == tiny == options()
    assert options("--max-value", "50") == tiny | {"max_value": 50}
    size = {"igsm": ("ops", ["3", "3"], [3, 3]), "promptbench": ("depth", ["2"], 2)}[task]
    assert options(f"--{size[0]}", *size[1]) == {"task": task, size[0]: size[2]}
    other = {"igsm": ["--depth", "2"], "promptbench": ["--ops", "3", "3"]}[task]
    with pytest.raises(data.InputError, match=f"{other[0]} has no effect with --task {task}"):
        options(*other)


def test_a_task_of_ones_own_gets_its_options(monkeypatch):
    """Bugs: --ops that reaches igsm alone; a task without a tiny preset that ends in a KeyError."""
    monkeypatch.setitem(data.TASKS, "new", data.IGSM())
    assert [p.ops for p in problems(5, task="new", ops=(3, 3))] == [3] * 5
    parser = data.Parser("")
    data.add_problem_flags(parser)
    for flags, options, tiny in ((["--ops", "3", "4"], {"ops": [3, 4]}, False), ([], {}, True)):
        args = parser.parse_args(["--task", "new", *flags])
        assert (data.problem_options(args), data.is_tiny(args)) == ({"task": "new"} | options, tiny)
    assert data.TASKS["new"].harder({}) == {"ops": [21, 23]} and data.TASKS["new"].harder({"ops": [3, 4]}) == {"ops": [5, 7]}


def test_splits_are_disjoint():
    """A test problem that was trained on: the same premises in another order would be in both."""
    for problem in problems(30, ops=(2, 3), split=None):
        shuffled = inject.shuffle_premises(problem, random.Random(1))
        assert data.split_of(shuffled) == data.split_of(problem.question)
    splits = [{data.fingerprint(p.question) for p in problems(100, ops=(2, 2), split=split)}
              for split in data.SPLITS]
    assert not splits[0] & splits[1] and not splits[1] & splits[2] and not splits[0] & splits[2]


@pytest.mark.parametrize("options, flag", [
    (dict(ops=(9, 3)), "--ops 9 3"), (dict(ops=(0, 3)), "--ops"), (dict(ops=(3, 31)), "--ops"),
    (dict(split="dev"), "--split dev"),
    (dict(task="gsm8k"), "--task gsm8k"), (dict(task="promptbench", depth=0), "--depth 0"),
    (dict(max_value=0), "--max-value 0"),
    (dict(task="promptbench", redundancy=(3, 1)), "--redundancy 3 1"),
    (dict(ops=(30, 30), size=(2, 2)), "no new problem")])
def test_impossible_wishes(options, flag):
    """An endless search or a traceback in place of a sentence that names the flag."""
    with pytest.raises(data.InputError, match=flag) as error:
        problems(10_000, **options)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- the executor
def side_by_definition(text):
    """What `read_side` should say. A side is operands with " + ", " - " or " * " between them; an operand is
    a number, letters or "(" side ")"; there are fewer than 100 tokens."""
    def operand(at):
        if match := re.compile("-?[0-9]{1,100}|[A-Za-z]+").match(text, at):
            token = match[0] if match[0].isalpha() else int(match[0])
            return [token], match.end()
        if text[at:at + 1] != "(":
            raise ValueError
        inner, at = side(at + 1)
        if text[at:at + 1] != ")":
            raise ValueError
        return ["(", *inner, ")"], at + 1

    def side(at):
        tokens, at = operand(at)
        while text[at:at + 3] in (" + ", " - ", " * "):
            more, end = operand(at + 3)
            tokens, at = [*tokens, text[at + 1], *more], end
        return tokens, at

    try:
        tokens, end = side(0)
    except ValueError:
        return None
    return tuple(tokens) if end == len(text) and len(tokens) < 100 else None


def random_side(rng, depth):
    if depth == 0 or rng.random() < .3:
        return rng.choice(["5", "-3", "x", "abc", "017"])
    return "(" + rng.choice([" + ", " - ", " * "]).join(random_side(rng, depth - 1) for _ in range(4)) + ")"


def test_sides_are_read_by_the_definition():
    """A regular expression that takes what is no formula, or refuses one: sides of answers, 60,000 others."""
    responses = [p.response for options in SETTINGS.values() for p in problems(20, seed=3, **options)]
    if REFERENCE.exists():
        responses += [json.loads(line)["response"] for line in REFERENCE.read_text().splitlines()]
    rng = random.Random(8)
    pieces = [*" ()+-*=", "5", "-7", "x", "ab", " + ", " - ", " * ", "(3 - y)", "٣", "9" * 101]
    lines = [line.rstrip(".") for text in responses for line in text.split("\n")]
    sides = [side for line in lines for side in line.split(" = ")[1:]]
    assert None not in map(data.read_side, sides)
    for n in range(60_000):
        noise = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        text = random_side(rng, rng.randint(0, 3)) if n % 2 else noise
        if text[:1] + text[-1:] == "()" and n % 3:
            text = text[1:-1]
        if text and n % 5 == 0:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(pieces) + text[at + 1:]
        sides.append(text)
    for text in sides:
        assert data.read_side(text) == side_by_definition(text), text


def test_line_kinds(sound):
    """A behavior that is shown as another, or a plain line that is marked."""
    for task in sound:
        for problem, steps, text in sound[task]:
            assert not any(map(data.line_kind, problem.response.split("\n")))
            text = inject.inject(problem, problem.response, p=.5, rng=random.Random(1))
            kinds = Counter(map(data.line_kind, text.split("\n")))
            report, read = data.check_trace(problem, text), data.read_steps(problem, text)
            assert (kinds["reflection"], kinds["analysis"]) == (report.reflections, report.analyses)
            assert kinds["subgoal"] == sum(step.subgoal and not step.analysis for step in read)
            assert report.subgoals == sum(step.subgoal for step in read)


def doctored(problem, node, formula, steps):
    """The answer that follows from another formula of one node; everything else in it agrees."""
    nodes = problem.nodes | {node: problem.nodes[node]._replace(formula=formula)}
    return data.write_response(replace(problem, nodes=nodes), steps)


def edit(response, index, old, new):
    """Replace in one step line (old: a regular expression)."""
    lines = response.split("\n")
    lines[index + 1] = re.sub(old, new, lines[index + 1], count=1)
    return "\n".join(lines)


class Corrupt:
    """Each method: (problem, steps, the answer they make, rng) -> (corrupted answer, kind, reason), or None
    where the problem offers no occasion."""

    def swapped_operands(problem, steps, text, rng):
        for s in steps:
            f = problem.nodes[s.node].formula
            if len(f) == 3 and f[1] == "-" and len(set(f)) == 3:
                return doctored(problem, s.node, f[::-1], steps), "retrieval", "is not what the problem says"

    def another_constant(problem, steps, text, rng):
        s = rng.choice(steps)
        f = problem.nodes[s.node].formula
        if isinstance(f[0], int) and len(f) > 1:
            bad = doctored(problem, s.node, (f[0] + 1,) + f[1:], steps)
            return bad, "retrieval", "is not what the problem says"

    def another_number_given(problem, steps, text, rng):
        i = rng.choice([i for i, s in enumerate(steps) if len(problem.nodes[s.node].formula) == 1])
        if problem.nodes[steps[i].node].parents == ():
            return edit(text, i, r"= \d+(\.?)$", r"= 12345\1"), "retrieval", "12345 is not what"

    def skipped_step(problem, steps, text, rng):
        lines = text.split("\n")
        del lines[rng.randrange(len(steps) - 1) + 1]
        return "\n".join(lines), "order", "comes before"

    def merged_operation(problem, steps, text, rng):
        for i, s in enumerate(steps):
            if len(problem.nodes[s.node].formula) > 3 and problem.task == "igsm":
                bad = edit(text, i, r"( = [^=]*[-+*][^=]*)( = [^=]*[-+*][^=]*)( = [^=]*)( = \S+)$", r"\1\2\4")
                return bad, "arithmetic", "more than one operation"

    def letter_reused(problem, steps, text, rng):
        i = rng.randrange(1, len(steps))
        if problem.task == "igsm":
            bad = data.open_step(problem, steps[i].node, steps[i - 1].letter, rng)
            return data.write_response(problem, steps[:i] + [bad] + steps[i + 1:]), "format", "is taken"

    def letter_unknown(problem, steps, text, rng):
        i = rng.choice([i for i, s in enumerate(steps) if problem.nodes[s.node].parents])
        p = problem.nodes[steps[i].node].parents[0]
        letter = next(s.letter for s in steps if s.node == p)
        unused = next(x for x in data.LETTERS if x not in {s.letter for s in steps})
        new = "zzz" if len(letter) > 1 else unused
        bad = edit(text, i, rf"(\w = (?:[^=]*\W)?){letter}\b(?=[^=]* = )", rf"\g<1>{new}")
        return bad, "format", f"the letter {new} has no value"

    def letter_changed(problem, steps, text, rng):
        i = rng.randrange(len(steps) - 1)
        if problem.task == "igsm":
            node, solved = steps[-1].node, {s.node for s in steps[:i]}
            missing = tuple(p for p in problem.nodes[node].parents if p not in solved)
            letter = next(x for x in data.LETTERS if x not in {s.letter for s in steps})
            bad = data.open_step(problem, node, letter, rng)._replace(missing=missing)
            lines = data.write_response(problem, steps[:i] + [bad] + steps[i:]).split("\n")
            return "\n".join(lines[:i + 2] + text.split("\n")[i + 1:]), "format", "was called"

    def wrong_value(problem, steps, text, rng):
        i = rng.choice([i for i, s in enumerate(steps) if problem.nodes[s.node].parents])
        return edit(text, i, r"= -?\d+(\.?)$", r"= 98765\1"), "arithmetic", "98765 is not"

    def numbers_swapped(problem, steps, text, rng):
        for i, s in enumerate(steps):
            f = problem.nodes[s.node].formula
            line = text.split("\n")[i + 1]
            m = re.search(r"= (-?\d+) \+ (-?\d+) =", line)
            if len(f) == 3 and f[1] == "+" and m and m[1] != m[2]:
                bad = edit(text, i, r"= (-?\d+) \+ (-?\d+) =", r"= \2 + \1 =")
                return bad, "retrieval", "not the values of the letters"

    def words_in_the_equation(problem, steps, text, rng):
        return edit(text, rng.randrange(len(steps)), r" = ", " = about "), "format", "cannot be read"

    def equation_outside_a_step(problem, steps, text, rng):
        lines = text.split("\n")
        lines.insert(rng.randint(1, len(steps) + 1), "So 2 + 2 = 5.")
        return "\n".join(lines), "format", "not a step"

    def reflection_on_unlocked(problem, steps, text, rng):
        i = rng.choice([i for i, s in enumerate(steps) if problem.nodes[s.node].parents])
        bad = data.open_step(problem, steps[i].node, steps[i].letter, rng)
        bad = bad._replace(missing=problem.nodes[steps[i].node].parents[:1])
        return data.write_response(problem, steps[:i] + [bad] + steps[i:]), "order", "which can be solved"

    def reflection_naming_solved(problem, steps, text, rng):
        for i, s in enumerate(steps):
            parents, solved = problem.nodes[s.node].parents, {t.node for t in steps[:i - 1]}
            if len(parents) > 1 and solved & set(parents) and not solved.issuperset(parents):
                bad = data.open_step(problem, s.node, s.letter, rng)._replace(missing=parents)
                bad = data.write_response(problem, steps[:i - 1] + [bad] + steps[i - 1:])
                return bad, "order", "other quantities"

    def reflection_naming_too_few(problem, steps, text, rng):
        for s in steps:
            if len(problem.nodes[s.node].parents) > 1:
                bad = data.open_step(problem, s.node, s.letter, rng)
                bad = bad._replace(missing=problem.nodes[s.node].parents[1:])
                return data.write_response(problem, [bad] + steps), "order", "other quantities"

    def analysis_of_another(problem, steps, text, rng):
        described = [q for q, node in problem.nodes.items() if node.text]
        i = rng.choice([i for i, s in enumerate(steps) if s.node in described])
        others = [q for q in described if problem.nodes[q].text != problem.nodes[steps[i].node].text]
        if others:
            wrong = problem.nodes[rng.choice(others)].text
            bad = steps[:i] + [steps[i]._replace(analysis=wrong)] + steps[i + 1:]
            return data.write_response(problem, bad), "retrieval", "not the premise"

    def premise_misquoted(problem, steps, text, rng):
        i = rng.choice([i for i, s in enumerate(steps) if problem.nodes[s.node].text])
        node = problem.nodes[steps[i].node]
        wrong = re.sub(r"\d+", lambda m: str(int(m[0]) + 1), node.text)
        if wrong == node.text:
            wrong = node.text.replace("sum", "difference")
        if wrong != node.text:
            bad = steps[:i] + [steps[i]._replace(analysis=wrong)] + steps[i + 1:]
            return data.write_response(problem, bad), "retrieval", "not the premise"

    def target_early(problem, steps, text, rng):
        lines = text.split("\n")
        lines.insert(1, lines.pop(len(steps)))
        return "\n".join(lines), "order", "comes before"

    def target_not_last(problem, steps, text, rng):
        solved = {s.node for s in steps}
        more = [q for q, node in problem.nodes.items() if q not in solved and solved.issuperset(node.parents)]
        if more:
            letter = data.new_letter(problem, more[0], {s.letter for s in steps}, rng)
            late = data.open_step(problem, more[0], letter, rng)._replace(subgoal=True)
            return data.write_response(problem, steps + [late]), "order", "the last step is not"

    def target_missing(problem, steps, text, rng):
        lines = text.split("\n")
        del lines[len(steps)]
        return "\n".join(lines), "order", "the last step is not"

    def solved_twice(problem, steps, text, rng):
        i = rng.randrange(len(steps) - 1)
        return data.write_response(problem, steps[:i + 1] + steps[i:]), "order", "solved already"

    def not_defined(problem, steps, text, rng):
        if problem.task == "promptbench":
            return edit(text, 0, r"solve (\w+), \w+", "solve zzz, zzz"), "retrieval", "does not define"
        (_, lower), (_, upper), *_ = problem.categories.items()
        for name in (f"each {o}'s {i}" for o in upper for i in lower):
            if name not in problem.nodes:
                return edit(text, 0, r"each .*?'s \w+ \w+", name), "retrieval", "does not define"

    def boxed_wrong(problem, steps, text, rng):
        bad = text.replace(f"\\boxed{{{problem.answer}}}", f"\\boxed{{{problem.answer + 1}}}")
        return bad, "answer", "the boxed answer is not"

    def two_answers(problem, steps, text, rng):
        bad = text.replace("</answer>", f"\\boxed{{{problem.answer}}}\n</answer>")
        return bad, "format", "no single boxed"

    def answer_inside_think(problem, steps, text, rng):
        bad = text.replace("</think>", "").replace("</answer>", "</answer>\n</think>")
        return bad, "format", "no single boxed"

    def steps_after_think(problem, steps, text, rng):
        text = text.replace("</think>\n<answer>\n", "").replace("<think>\n", "<think>\n</think>\n<answer>\n")
        return text, "order", "the last step is not"

    def no_answer(problem, steps, text, rng):
        return text.partition("</think>")[0], "format", "no single boxed"


CORRUPTIONS = {name: f for name, f in vars(Corrupt).items() if not name.startswith("_")}
# PromptBench: no constants, names are letters, one operation
IGSM_ONLY = {"another_constant", "merged_operation", "letter_reused", "letter_changed"}


@pytest.fixture(scope="module")
def sound():
    """(problem, steps, answer) with subgoals and analyses, all sound."""
    made = {}
    for task, options in {"igsm": dict(ops=(8, 14)), "promptbench": dict(task="promptbench")}.items():
        made[task] = []
        for problem in problems(1200 if FULL else 60, seed=9, **options):
            text = inject.inject(problem, problem.response, ("subgoal",), 0)
            assert data.check_trace(problem, text, subgoal=True).ok
            made[task].append((problem, data.read_steps(problem, text), text))
    return made


@pytest.mark.parametrize("task", ["igsm", "promptbench"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_caught(name, task, sound):
    """An executor that lets this fault pass, or stops at it for another reason."""
    if task == "promptbench" and name in IGSM_ONLY:
        return
    caught, wanted = 0, 200 if FULL else 10
    for number, (problem, steps, text) in enumerate(sound[task]):
        made = CORRUPTIONS[name](problem, steps, text, random.Random(number))
        if made and made[0] != text and caught < wanted:
            report = data.check_trace(problem, made[0], subgoal=True)
            assert report.error and report.error.kind in made[1], (made, report)
            assert made[2] in report.error.reason, (made, report)
            assert report.error.line <= made[0].count("\n") + 1
            caught += 1
    assert caught == wanted


def test_executor_survives_anything(sound):
    """An exception or a hang on what a model writes: cut, spliced or repeated lines, monsters, brackets."""
    rng, slowest = random.Random(4), 0
    monsters = ["9" * 5000, "(" * 3000 + "1" + ")" * 3000, "*".join(["99999"] * 3000),
                " * ".join(["9" * 99] * 3000), "(5)", "((5 + (1)))",
                "- - 5", "", ")(", "= = =", "\x00", "٣", "²", "a" * 5000,
                "each Old Barn's " * 900, "<0>", "But " * 3000, "x = " * 4000,
                ". " * 9000]
    for task in sound:
        for problem, steps, text in sound[task][:40]:
            lines = text.split("\n")
            for _ in range(200 if FULL else 12):
                words = rng.choice(lines).split(" ")
                words[rng.randrange(len(words))] = rng.choice(monsters + words)
                at = rng.randrange(len(lines))
                bad = "\n".join(rng.choice([lines[:at] + [" ".join(words)] + lines[at + rng.randint(0, 2):],
                                            lines[:at] + [" ".join(words)] * 40 + lines[at:],
                                            rng.sample(lines, len(lines))]))
                start = time.process_time()
                data.check_trace(problem, bad)
                slowest = max(slowest, time.process_time() - start)
    print(f"\nslowest check: {1e3 * slowest:.1f} ms")
    assert slowest < .3


# ---------------------------------------------------------------------------------------------- reward
ENDINGS = {  # ending -> reward for the answer -7
    "</think><answer>\\boxed{-7}</answer>": 1,
    "x</think>\n<answer>\nThe final answer is \\boxed{-7}.\n</answer>": 1,
    "<think>x</think><answer>\\boxed{-7}</answer>": 1,
    "  <think></think> \n <answer> \\boxed{-7} </answer>\n\n": 1,
    "x</think><answer>7 or 8? \\boxed{-7}!</answer>": 1, "x</think><answer>\\boxed{-07}</answer>": 1,
    "x</think><answer>\\boxed{7}</answer>": 0, "x</think><answer>\\boxed{--7}</answer>": 0,
    "x</think><answer>\\boxed{+-7}</answer>": 0,
    "x</think><answer>\\boxed{- 7}</answer>": 0, "x</think><answer>\\boxed{ -7}</answer>": 0,
    "x</think><answer>\\boxed{-7 }</answer>": 0,
    "x</think><answer>\\boxed{-7.0}</answer>": 0, "x</think><answer>\\boxed{-7,0}</answer>": 0,
    "x</think><answer>\\boxed{−7}</answer>": 0,
    "x</think><answer>\\boxed{-٧}</answer>": 0, "x</think><answer>\\boxed{-７}</answer>": 0,
    "x</think><answer>\\boxed{}</answer>": 0,
    "x</think><answer>\\boxed{-7</answer>": 0, "x</think><answer>boxed{-7}</answer>": 0,
    "x</think><answer>-7</answer>": 0,
    "x</think><answer>\\boxed -7</answer>": 0, "x</think><answer>\\boxed{x}</answer>": 0,
    "x</think><answer>\\boxed{1e1}</answer>": 0,
    "x</think><answer>\\boxed{-7}\\boxed{-7}</answer>": 0,
    "x</think><answer>\\boxed{-7} or \\boxed{7}</answer>": 0,
    "x</think><answer>\\boxed{-7} \\boxed{</answer>": 0, "x</think><answer>\\boxed{\\boxed{-7}}</answer>": 0,
    "\\boxed{-7}</think><answer>\\boxed{-7}</answer>": 0,
    "x</think>\\boxed{-7}<answer>\\boxed{-7}</answer>": 0,
    "x</think><answer>\\boxed{-7}</answer>\\boxed{-7}": 0, "x</think><answer>\\boxed{-7}</answer> so -7": 0,
    "x</think>so <answer>\\boxed{-7}</answer>": 0, "x</think><answer>\\boxed{-7}": 0,
    "x</think>\\boxed{-7}</answer>": 0,
    "x</think>\\boxed{-7}": 0, "x<answer>\\boxed{-7}</answer>": 0, "x<answer>\\boxed{-7}</answer></think>": 0,
    "<answer>\\boxed{-7}</answer>": 0, "x</think></think><answer>\\boxed{-7}</answer>": 0,
    "x</think><answer><think></think>\\boxed{-7}</answer>": 0,
    "<think><think>x</think><answer>\\boxed{-7}</answer>": 0,
    "x</think><answer><answer>\\boxed{-7}</answer></answer>": 0,
    "x</think><answer></answer><answer>\\boxed{-7}</answer>": 0,
    "x</think><answer>\\boxed{-7}</answer></answer>": 0, "<answer>x</think><answer>\\boxed{-7}</answer>": 0,
    "x</THINK><answer>\\boxed{-7}</answer>": 0, "x</think><answer>\\boxed{-7}</ANSWER>": 0,
    "x</think><answer>\\BOXED{-7}</answer>": 0,
    "x</think><answer>\\boxed{-7" + "0" * 6000 + "}</answer>": 0,
    "x</think><answer>\\boxed{99**98**97}</answer>": 0, "": 0, "</answer>": 0}


def test_reward_table():
    """A reward that pays for a hedge, an echo, a second try or no answer at all."""
    assert len(ENDINGS) >= 40
    for ending, wanted in ENDINGS.items():
        assert data.reward(ending, -7) == wanted, ending
        assert data.reward(ending, 8) == 0 and type(data.reward(ending, 8)) is float


def test_reward_on_noise():
    """An exception or a slow regular expression: noise of bytes and the reward's own words, up to 20 kB."""
    rng, pieces = random.Random(2), ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}",
                                     "\\boxed{7}", "-", "7", "\n", " "]
    hostile = [piece * (20_000 // len(piece)) for piece in pieces]
    hostile.append("</think><answer>" + "\\boxed{" + "7" * 20_000 + "}</answer>")
    worst = 0
    for n in range(200_000 if FULL else 6000):
        size = 20_000 if n % 100 == 0 else rng.randint(0, 300)
        words = "".join(rng.choices(pieces, k=size // 5)) if n % 2 == 0 else ""
        text = rng.randbytes(size).decode("utf-8", "replace") if n % 2 else words
        text = hostile[n] if n < len(hostile) else text
        start = time.process_time()
        assert data.reward(text, 7) in (0.0, 1.0)
        worst = max(worst, time.process_time() - start) if size == 20_000 or n < len(hostile) else worst
    print(f"\nslowest reward at 20 kB: {1e3 * worst:.2f} ms")
    assert min(timed(text) for text in hostile) < 1e-3 and max(timed(text) for text in hostile) < 1e-3


def timed(text):
    """Best of five: other processes share the machine."""
    times = []
    for _ in range(5):
        start = time.process_time()
        data.read_answer(text)
        times.append(time.process_time() - start)
    return min(times)


# ------------------------------------------------------------------------------------------- the command
GOOD = '{"question": "What is the value of ab?", "answer": 1, "task": "promptbench"}\n'


@pytest.mark.parametrize("content, line", [
    ("", "holds no problem"), ("\n\n", "holds no problem"), (GOOD + "{oops\n", "line 2: not JSON"),
    (GOOD + "[1]\n", "line 2"), ("[" * 100_000, "line 1"),
    ('{"question": "x"}\n', "'answer'"), ('{"question": "x", "answer": true}\n', "'answer'"),
    ('{"question": "x", "answer": "7"}\n', "'answer'"),
    ('{"question": 3, "answer": 7}\n', "'question'"),
    ('{"question": "x", "answer": 7, "response": 3}\n', "'response'"),
    ('{"question": "x", "answer": 7, "categories": {"a": "b"}}\n', "'categories'"),
    ('{"question": "x", "answer": 7, "task": []}\n', "'task'"),
    ('{"question": "x", "answer": ' + "7" * 5000 + "}\n", "line 1"),
    ('{"question": "x", "answer": 7, "ops": "a"}\n', "'ops'"),
    (b"\xff\xfe\x00", "UTF-8"), (None, "No such file")])
def test_bad_files(content, line, tmp_path):
    """A traceback, or a message that does not say which file and line."""
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.InputError, match=line) as error:
        data.read_problems(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, word", [
    (["--ops", 9, 3], "--ops 9 3"), (["--ops", 9], "--ops"), (["--wurst"], "--wurst"), (["--n", 0], "--n"),
    (["--seed", -1], "--seed"), (["--n", 10 ** 20], "--n"), (["--seed", 10 ** 23], "--seed"),
    (["--workers", 10 ** 12], "--workers"), (["--depth", 3], "--task promptbench"),
    (["--out", "package.json"], "package.json: exists already"),
    (["--task", "gsm8k"], "--task"), (["--task", "promptbench", "--redundancy", 9, 3], "--redundancy 9 3"),
    (["--out", "no/where.jsonl"], "no/where.jsonl")])
def test_bad_flags(arguments, word, script, tmp_path):
    """A traceback, a silent default, or a message that does not name the flag; another program's JSON file
    overwritten."""
    (tmp_path / "package.json").write_text('{"name": "x"}')
    done = script("data.py", *arguments)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_help_says_every_default():
    """Bugs: a default that --help does not say, says twice, or says of a flag that has none."""
    parser = data.Parser("Doc.")
    add = parser.add_argument
    add("--n", type=data.positive_int, default=7, help="how many"), add("--none", help="nothing")
    add("--said", default=3, help="default: three"), add("--switch", action="store_true", help="on")
    add("--bare", default=0)  # not False
    lines = {line.split()[0]: line for line in parser.format_help().splitlines() if line.startswith("  --")}
    assert "how many (default: 7)" in lines["--n"] and "(default: 0)" in lines["--bare"]
    assert lines["--said"].endswith("default: three")
    assert not any("default" in lines[name] for name in ("--none", "--switch"))


def test_without_arguments(script):
    """The first thing a reader runs does not show the problem, its graph and its answer."""
    done = script("data.py")
    assert done.returncode == 0
    assert "How many" in done.stdout and " +-- each " in done.stdout and "</answer>" in done.stdout


FARM = """The number of each Tall Barn's Tin Crate equals 5 more than each Old Barn's Crate.
The number of each Old Barn's Tin Crate equals 2.
The number of each Tall Barn's Pine Crate equals 3 times each Old Barn's Tin Crate.
The number of each Old Barn's Pine Crate equals 4.
How many Tin Crate does each Tall Barn have?"""


@pytest.mark.parametrize("line, right", [
    ("- Let a be the number of each Old Barn's Tin Crate. Then a = 2.", True),
    ("- Let a be the number of each Old Barn's Tin Crate. Then a = 3. Then a = 2.", False),
    ("- Let a be the number of each Old Barn's Tin Crate. And 7 = 8. Then a = 2.", False),
    ("- Let a be the number of each Old Barn's Tin Crate. Then 7 = 8, so a = 2.", False),
    ("- Let a be the number of each Old Barn's Tin Crate and equals 9 times each Tall Barn's Pine Crate. Then a = 2.", False),
    ("- Let a be the number of each Old Barn's Tin Crate. It equals 2. Then a = 2.", True),
    ("- Let a be the number of each Old Barn's Tin Crate. It equals 7. It equals 2. Then a = 2.", False),
    ("- Let c be the number of each Tall Barn's Pine Crate. But each Old Barn's Tin Crate must be known first, so c has to "
     "wait.", True),
    ("- Let c be the number of each Tall Barn's Pine Crate. But each Old Barn's Crate must be known first. But each Old "
     "Barn's Tin Crate must be known first, so c has to wait.", False)])
def test_nothing_in_a_line_goes_unchecked(line, right):
    """Bug: a false equation, premise or reflection that a later one on the same line hides."""
    report = data.check_trace(data.read_question(FARM), f"<think>\n{line}\n</think>\n<answer>\n</answer>")
    assert (report.steps + report.reflections == 1) == right
    assert right or report.error.kind == "format"


@pytest.mark.parametrize("sides, right", [
    ("2 + 4 + 3 = 6 + 3 = 9", True), ("2 + 4 + 3 = 2 + 7 = 9", True), ("2 * (4 + 3) = 2 * 7 = 14", True),
    ("2 * (4 + 3 - 1) = 2 * (7 - 1) = 2 * 6 = 12", True), ("2 + 4 + 3 = 9 + 0 = 9", False), ("2 + 4 + 3 = 3 * 3 = 9", False),
    ("2 + 4 + 3 = 9", False), ("2 * (4 + 3) = (14 + 0) = 14", False)])
def test_a_subgoal_is_one_operation_of_the_side_before(sides, right):
    """Bug: operations counted and not looked at, so that "9 + 0" passed for a subgoal of 2 + 4 + 3."""
    first, *others = [data.read_side(side) for side in sides.split(" = ")]
    assert all(map(data.one_step, [first, *others], others)) == right


@pytest.mark.parametrize("question, categories, words", [
    (FARM.replace("Pine Crate equals 4.", "Pine Crate equals 4.\nThe number of each Old Barn's Crate equals 100."), None,
     "line 5: 'each Old Barn's Crate' is implied"),
    ("The number of each b's a equals 1.\nHow many A does each b have?", {"A": ["a", "a"], "B": ["b"]}, "one twice"),
    ("The number of each b's a0 equals 1.\nHow many a0 does each b have?",
     {"A": [f"a{i}" for i in range(1000)], "B": ["b"]}, "over 400 items"),
    ("How many" + " x does each" * 4000 + " y have?", None, "line 1: over 5,000 characters")])
def test_questions_that_contradict_themselves_or_never_end(question, categories, words):
    """Bugs: a premise that overrides an implied sum; an item that counts twice; a text that takes minutes to read."""
    with pytest.raises(ValueError, match=words):
        data.read_question(question, categories)


def test_the_split_of_a_text_with_other_line_ends():
    """Bug: a problem in another split once a file has put a line end behind its question."""
    assert len({data.split_of(text) for text in (FARM, FARM + "\n", FARM.replace("\n", "\r\n"), FARM + " ")}) == 1


def test_a_record_without_operations_gets_those_of_its_question():
    """Bug: "ops": 0 written for a record that came without the field."""
    record = {"question": FARM, "answer": 11}
    assert data.from_record(record, graph=True).ops == 4 and data.from_record(record | {"ops": 7}, graph=True).ops == 7


def killed(start):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_sentence():
    """Bug: a traceback, or a wait without end, where a process of --workers was killed or could not be started."""
    with pytest.raises(data.InputError, match="--workers 2: a process failed"):
        next(data.draw_chunks(killed, 2))


def test_a_link_and_a_files_permissions_stay(tmp_path):
    """Bug: a link replaced by a file, its target left as it was; a private file that all can read."""
    (tmp_path / "there").write_text("old")
    (tmp_path / "there").chmod(0o600)
    (tmp_path / "link").symlink_to("there")
    data.write_records(tmp_path / "link", [{"id": 0}])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == '{"id": 0}\n'
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o600
    data.write_records(tmp_path / "new", [])
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
