"""Chapter 1. Problems: word problems that are graphs in disguise.

    python data.py                                          # one problem, its graph, its answer
    python data.py --ops 15 20 --n 2000 --seed 100 --out train.jsonl
    python data.py --task promptbench --depth 4 --redundancy 0 8 --n 5000 --out train.jsonl

A problem is a directed acyclic graph (DAG). Every *quantity* is a node; an edge runs to it from each
quantity that it is computed from, its *parent*. The question states one premise a line in random order, and
the answer walks the graph from what is given to what is asked:

>>> farm = '''The number of each Tall Barn's Tin Crate equals 5 more than each Old Barn's Crate.
... The number of each Old Barn's Tin Crate equals 2.
... The number of each Tall Barn's Pine Crate equals 3 times each Old Barn's Tin Crate.
... The number of each Old Barn's Pine Crate equals 4.
... How many Tin Crate does each Tall Barn have?'''
>>> print(draw_picture(read_question(farm)))
each Tall Barn's Tin Crate = 5 + 6 = 11
 +-- each Old Barn's Crate = 2 + 4 = 6 (implied)
      +-- each Old Barn's Tin Crate = 2
      +-- each Old Barn's Pine Crate = 4
not needed:
each Tall Barn's Pine Crate = 3 * 2 = 6
 +-- each Old Barn's Tin Crate (see above)

"each Old Barn's Crate" is *implied*: no premise states it, it is the sum over Old Barn's crates. A node is
*locked* as long as one of its parents is unsolved: at first, all but the two that are given.

The file follows a problem's life: graph, words, answer, reading the text back, checking an answer step by
step, many problems, files. It takes an hour to read; at first skip section 5 (PromptBench, a second task:
trees, in other words), 10 (flags and files), the command in 11, and 12 (names). Source: Ye et al. 2024
("Physics of Language Models 2.1"), as modified by BRIDGE (arXiv 2505.18917): no modulo, large answers
dropped, redundant premises; PromptBench arithmetic is Zhu et al. 2024 ("DyVal").

Where we depart from the released generator and the paper:
1. the names are our own, and a name never makes a premise ambiguous (theirs are split at "'s ");
2. the size of the structure follows the number of operations, so 1 operation works as well as 30;
3. a hash of the text decides whether a problem is for training, validation or test, whatever the seed;
4. PromptBench names are random (in DyVal their order gives the solution away), and "subtracting B from A" is
   A - B.
"""
import argparse, hashlib, io, json, math, multiprocessing, os, re, signal, sys, tempfile, threading, time
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import count, islice, product
from random import Random
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------ 1. A problem is a graph
SYMBOLS = ("+", "-", "*", "(", ")")


class Node(NamedTuple):
    """One quantity. `formula` is a tuple of ints, names of parents and the symbols + - * ( )."""
    name: str       # "each Old Barn's Crate"
    formula: tuple  # (5, "*", "(", "each ...", "+", "each ...", ")")
    text: str       # what its premise says of it: "5 times the sum of ..."; "" if the quantity is implied

    @property
    def parents(self):
        return tuple(dict.fromkeys(t for t in self.formula if isinstance(t, str) and t not in SYMBOLS))

    @property
    def degree(self):
        """In-degree, where a constant written in the premise counts as one in-edge."""
        return sum(t not in SYMBOLS for t in self.formula)

    @property
    def operations(self):
        """The paper's measure of size: a given value or a copy, which computes nothing, counts as one."""
        return max(1, self.degree - 1)


@dataclass
class Problem:
    question: str                 # premises, one a line, then the question line
    answer: int
    target: str = ""              # name of the node that is asked for
    nodes: dict = field(default_factory=dict)  # name -> Node: described and implied, needed and redundant
    response: str = ""            # <think> ... </think> <answer> ... </answer>
    ops: int = 0                  # operations of the nodes that the answer needs
    categories: dict = field(default_factory=dict)  # igsm: category -> items drawn, lowest layer first
    task: str = "igsm"
    id: object = None
    depth: int = 0                # promptbench: levels of the tree, and how many trees it does not need
    redundancy: int = 0


def needed_nodes(nodes, *targets):
    """Names of the nodes that `targets` depend on, themselves included, parents before children.

    Raises ValueError where a node is not defined or depends on itself."""
    done, begun = {}, set()  # done: in the order of the result

    def visit(name):
        if name in done:
            return
        if name not in nodes:
            raise ValueError(f"'{name}' is used but never defined")
        if name in begun:
            raise ValueError(f"'{name}' depends on itself")
        begun.add(name)
        for parent in nodes[name].parents:
            visit(parent)
        done[name] = True

    for target in targets:
        visit(target)
    return list(done)


def reduce_once(tokens):
    """Carry out one operation: innermost bracket first, then * before + and -, then left to right.

    >>> reduce_once((9, "*", "(", 0, "-", 3, ")"))
    (9, '*', -3)
    """
    end = tokens.index(")") if ")" in tokens else len(tokens)  # the first ")" closes an innermost bracket
    start = max((i for i in range(end) if tokens[i] == "("), default=-1) + 1
    inner = tokens[start:end]
    if len(inner) > 1:
        at = inner.index("*") if "*" in inner else 1
        a, symbol, b = inner[at - 1:at + 2]
        value = a * b if symbol == "*" else a + b if symbol == "+" else a - b
        inner = inner[:at - 1] + (value,) + inner[at + 2:]
    if len(inner) == 1 and start:  # the bracket holds a single number now: drop it
        return tokens[:start - 1] + inner + tokens[end + 1:]
    return tokens[:start] + inner + tokens[end:]


def evaluate(tokens, values=None):
    """The value of a formula; `values` gives the names in it their numbers."""
    if values is not None:
        tokens = tuple(values.get(t, t) for t in tokens)
    while len(tokens) > 1:
        tokens = reduce_once(tokens)
    return tokens[0]


def solve(formulas):
    """{name: formula}, parents before children -> {name: value}."""
    values = {}
    for name, formula in formulas.items():
        values[name] = evaluate(formula, values)
    return values


# ----------------------------------------------------------------------- 2. The structure graph: who has what
def draw_widths(rng, size):
    """How many items each layer has, lowest first, where `size` edges can connect them all."""
    for _ in range(200):
        widths = [rng.randint(2, 4) for _ in range(rng.randint(2, 4))]
        pairs = list(zip(widths, widths[1:]))
        if sum(map(max, pairs)) <= size <= sum(a * b for a, b in pairs):
            return widths
    return [min(size, 4), 1]  # a very small structure: one owner, `size` items


def draw_structure(rng, size):
    """Layers of named items and `size` edges between neighbouring layers -> (categories, edges).

    Every item owns one at least (unless lowest) and has an owner (unless highest), so that every implied
    quantity is defined. edges: list of (owner, item), the *instance parameters* "each owner's item"."""
    world = rng.choice(WORLDS)
    widths = draw_widths(rng, size)
    bottom = rng.randint(0, 4 - len(widths))
    names = list(world)[bottom:bottom + len(widths)]
    layers = [rng.sample(rng.choice(world[name]), width) for name, width in zip(names, widths)]
    edges, spare = [], []
    for lower, upper in zip(layers, layers[1:]):
        items, owners = rng.sample(lower, len(lower)), rng.sample(upper, len(upper))
        turns = range(max(len(owners), len(items)))  # dealt like cards: the shorter row starts over
        dealt = [(owners[i % len(owners)], items[i % len(items)]) for i in turns]
        edges += dealt
        spare += [(owner, item) for owner in upper for item in lower if (owner, item) not in dealt]
    edges += rng.sample(spare, max(0, min(size - len(edges), len(spare))))
    return dict(zip(names, layers)), edges


def quantity(owner, item):
    return f"each {owner}'s {item}"


def implied_nodes(categories, edges):
    """Every *implied quantity* "each X's <Category>" that a structure graph defines: name -> Node.

    No premise states it. If X's own items are of that category it is their sum; further down it is the sum
    over X's items Y of (each X's Y) * (each Y's <Category>). Summands stand in the order of `categories`."""
    names, layers = list(categories), list(categories.values())
    edges, nodes = set(edges), {}
    for level in range(1, len(layers)):
        for owner in layers[level]:
            items = [item for item in layers[level - 1] if (owner, item) in edges]
            for below, category in enumerate(names[:level]):
                formula, lower = [], []  # lower: the implied quantities that it takes from the layer below
                for item in items:
                    formula += ["+", quantity(owner, item)]
                    if below < level - 1:
                        lower.append(quantity(item, category))
                        formula += ["*", lower[-1]]
                if items and all(q in nodes for q in lower):
                    name = quantity(owner, category)
                    nodes[name] = Node(name, tuple(formula[1:]), "")  # without the first "+"
    return nodes


# -------------------------------------------------------- 3. The dependency graph: what is computed from what
def listed(names):
    """("A", "B", "C") -> "A, B and C"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def describe(name, constant, link, kind, parents):
    """What one premise says, as a Node: "[constant] [link] [the kind of] [parents]".

    constant: int or None; link: "more than", "times" or ""; kind: "sum", "difference" or ""."""
    body = tuple(t for p in parents for t in ("-" if kind == "difference" else "+", p))[1:]
    if link == "more than":
        formula = (constant, "+", *body)
    elif link == "times":
        formula = (constant, "*", "(", *body, ")") if kind else (constant, "*", *body)
    else:
        formula = body or (constant,)
    words = f"the {kind} of {listed(parents)}" if kind else listed(parents)
    text = " ".join(str(part) for part in (constant, link, words) if part not in (None, ""))
    return Node(name, formula, text)


def draw_premise(rng, name, parents, has_constant):
    """A premise over these parents, with a written constant or without -> Node."""
    kind = "" if len(parents) < 2 else "sum" if len(parents) > 2 else rng.choice(("sum", "difference"))
    link = rng.choice(("more than", "times")) if has_constant and parents else ""
    constant = rng.randint(0, 9) if has_constant else None
    return describe(name, constant, link, kind, rng.sample(parents, len(parents)))


def draw_needed(rng, edges, implied, ops):
    """What the answer needs -> (order, {instance: (parents, whether a constant is written)}), or None.

    In stages: (1) implied quantities with all that they rest on, (2) more instance parameters, (3) an order
    with the edges that it takes, (4) in-degrees raised until the operations are exactly `ops`."""
    limit = rng.randint((ops + 1) // 2, ops)  # what stages 1 and 2 may spend; stage 4 spends the rest
    needed, spent = choose_needed(rng, [quantity(*edge) for edge in edges], implied, limit)
    ordered = order_needed(rng, needed, implied, ops, spent)
    return ordered and raise_degrees(rng, *ordered, ops)


def choose_needed(rng, instances, implied, limit):
    """Stages 1 and 2 -> (quantities, operations they cost at least)."""
    needed, spent = [], 0
    nodes = implied | {q: Node(q, (0,), "") for q in instances}  # an instance parameter costs at least 1
    for name in rng.sample(list(implied), rng.randint(0, min(3, len(implied)))):
        extra = [q for q in needed_nodes(nodes, name) if q not in needed]
        cost = sum(nodes[q].operations for q in extra)
        if spent + cost <= limit:
            needed += extra
            spent += cost
    free = [q for q in instances if q not in needed]
    more = rng.sample(free, min(len(free), limit - spent))  # at least one where nothing is needed yet
    return needed + more, spent + len(more)


def order_needed(rng, waiting, implied, ops, spent):
    """Stage 3: an order, drawn from the target backwards, in which every quantity serves a later one.

    -> (order, {instance: parents}, operations spent), or None where a quantity finds nothing to serve.

    On the farm above: Old Barn's Tin and Pine Crate must not be drawn before the implied Old Barn's Crate
    that rests on them. Tall Barn's Tin Crate is drawn first, so it is the target. Then comes Old Barn's
    Crate: nothing rests on it yet, so it becomes a parent of Tall Barn's Tin Crate. Last come Pine and Tin
    Crate; they serve Old Barn's Crate already. Read backwards: Tin, Pine, Old Barn's Crate, target."""
    # how many implied quantities that rest on it have no place yet: it is not drawn before they have
    unplaced_users = Counter(p for q in waiting if q in implied for p in implied[q].parents)
    useful = set()  # what implied quantities with a place rest on: it serves a later one already
    parents, backwards = {q: [] for q in waiting if q not in implied}, []
    while waiting:
        most = 3 if spent < ops else 2  # a second parent costs nothing, a third costs an operation
        # premises with a place that can take one more parent
        takers = [q for q in backwards if q in parents and len(parents[q]) < most]
        ready = [q for q in waiting if not unplaced_users[q] and (q in useful or takers or not backwards)]
        if not ready:
            return None
        drawn = rng.choice(ready)
        if backwards and drawn not in useful:
            taker = rng.choice(takers)
            spent += len(parents[taker]) == 2
            parents[taker].append(drawn)
        if drawn in implied:
            useful.update(implied[drawn].parents)
            unplaced_users.subtract(implied[drawn].parents)
        backwards.append(drawn)
        waiting.remove(drawn)
    return backwards[::-1], parents, spent


def raise_degrees(rng, order, parents, spent, ops):
    """Stage 4 -> what `draw_needed` returns, with exactly `ops` operations.

    No in-degree exceeds 4. A node's second edge costs nothing, every further one an operation."""
    has_constant = {q: not parents[q] for q in parents}
    place = {q: i for i, q in enumerate(order)}
    growing = [q for q in parents if place[q] > 0]
    for q in growing:
        if len(parents[q]) == 1 and rng.random() < 0.7:
            has_constant[q] = True
    while spent < ops:
        if not growing:
            return None
        q = rng.choice(growing)
        degree = len(parents[q]) + has_constant[q]
        earlier = [p for p in order[:place[q]] if p not in parents[q]]
        if degree == 4 or (not earlier and has_constant[q]):
            growing.remove(q)
            continue
        if not has_constant[q] and (not earlier or rng.random() < 0.3):
            has_constant[q] = True
        else:
            parents[q].append(rng.choice(earlier))
        spent += degree >= 2
    return order, {q: (parents[q], has_constant[q]) for q in parents}


def draw_redundant(rng, edges, implied, order):
    """The premises of the instance parameters that the answer does not need: name -> Node."""
    pool, nodes = list(order), {}
    rest = [q for q in (quantity(*edge) for edge in edges) if q not in order]
    for q in rng.sample(rest, len(rest)):
        degree = rng.choice((0, 1, 1, 2, 2, 3)) if pool else 0
        chosen = rng.sample(pool, min(degree, len(pool)))
        nodes[q] = draw_premise(rng, q, chosen, not chosen or (len(chosen) < 4 and rng.random() < 0.5))
        pool.append(q)
        known = set(pool)  # an implied quantity may serve once all that it rests on is described
        pool += [a for a, node in implied.items() if a not in known and known.issuperset(node.parents)]
    return nodes


def add_implied(nodes, implied, wanted=()):
    """Add to `nodes` the implied quantities that `wanted` or a premise names. KeyError: one is undefined."""
    mentioned = [p for node in nodes.values() for p in node.parents] + list(wanted)
    for name in mentioned:  # it grows on the way: an implied quantity can rest on implied ones
        if name not in nodes:
            nodes[name] = implied[name]
            mentioned += implied[name].parents


def too_large(values, target, max_answer, max_value):
    """Why a draw with these values is rejected, or ""."""
    if max_value and any(abs(value) >= max_value for value in values.values()):
        return "a value too large"
    return "answer too large" if abs(values[target]) >= max_answer else ""


def draw_problem(rng, ops=(15, 20), max_answer=1000, max_value=None, size=None, tidy=False):
    """One draw of the generator -> a Problem, or a string that says why the draw was rejected."""
    wanted = rng.randint(*ops)
    low = max(2, wanted // 2)
    size = rng.randint(*size) if size else rng.randint(low, low + 6)
    categories, edges = draw_structure(rng, size)
    implied = implied_nodes(categories, edges)
    graph = draw_needed(rng, edges, implied, wanted)
    if graph is None:
        return "no graph with so many operations"
    order, drawn = graph
    nodes = {q: draw_premise(rng, q, *drawn[q]) for q in drawn}
    known = implied | nodes
    values = solve({q: known[q].formula for q in order})
    if reason := too_large(values, order[-1], max_answer, max_value):
        return reason
    nodes |= draw_redundant(rng, edges, implied, order)
    add_implied(nodes, implied, order)
    problem = Problem("", values[order[-1]], order[-1], nodes, ops=wanted, categories=categories)
    return finish(problem, order, rng, tidy)


# --------------------------------------------------------------------------------------- 4. The words of iGSM
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER = "</think>\n<answer>\nThe final answer is \\boxed{{{value}}}.\n</answer>"


class Step(NamedTuple):
    """One line of an answer. A *reflection* is a step on a locked node: `missing` parents and no equation."""
    node: str
    letter: str
    head: str           # "- Let x be the number of each Old Barn's Crate."
    link: str = "Then"
    analysis: str = ""  # the premise of the node, restated before the equation
    subgoal: bool = False  # one operation per "="
    missing: tuple = ()
    equation: str = ""  # as it was read: "x = 5 + y = 5 + 3 = 8"


def has_subgoals(text, task):
    """Whether an equation is longer than the plain "letter = formula (= numbers, in iGSM) = value"."""
    return text.count(" = ") > (3 if task.numbers else 2)


@lru_cache(256)  # it is asked for the same few at every line of a question
def pattern(template, **fields):
    """The regular expression that reads back what `template.format(...)` wrote, a named group for each field.

    fields: what each field may hold, as a regular expression; ".+" where none is given.

    >>> pattern("Let {x} be the {name}", x="[a-z]")
    'Let\\\\ (?P<x>[a-z])\\\\ be\\\\ the\\\\ (?P<name>.+)'
    """
    def group(field):
        return f"(?P<{field[1]}>{fields.get(field[1], '.+')})"
    return re.sub(r"\\{(\w+)\\}", group, re.escape(template))


class IGSM:
    """Grade-school problems: how each line is written and read back. PromptBench has the same attributes."""
    draw = staticmethod(draw_problem)
    options = ("ops", "size", "tidy", "max_answer", "max_value")  # what `draw` takes
    level = "ops"     # the option that says how hard a problem is, also a field of Problem
    hardness = "ops"  # the option that is raised out of distribution
    record = ("ops", "categories")                                # the fields of a record that are its own

    premise = "The number of {name} equals {text}."
    question = "How many {item} does each {owner} have?"
    step = "- "  # how a step's line starts
    openings = ("- Let {x} be the number of {name}.",
                "- The number of {name} is written {x}.",
                "- Now call the number of {name} {x}.")
    links = ("Then", "So")  # between the opening and the equation
    stop = "."              # after the equation
    analysis = "It equals {text}."
    reflection = "But {missing} must be known first, so {x} has to wait."
    letters = LETTERS       # each quantity has a letter of its own
    numbers = True          # a plain equation shows the numbers that it adds up: x = y + z = 2 + 3 = 5

    def harder(self, options):
        """What is drawn out of distribution where nobody says it: up to 3 operations more, 30 at most."""
        return {"ops": [min(RANGES["ops"][1], options.get("ops", (15, 20))[1] + more)
                        for more in (1, 3)]}

    def ask(self, target):
        """The question line that asks for a quantity."""
        owner, item = target.removeprefix("each ").split("'s ")
        return self.question.format(item=item, owner=owner)

    def read_asked(self, line):
        """The question line -> the name of the quantity that is asked for, or None."""
        match = re.fullmatch(pattern(self.question), line)
        return match and quantity(match["owner"], match["item"])

    def names(self, categories):
        """A regular expression for the quantities that are possible: "each <item>'s <item or category>"."""
        def one_of(names):
            return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        layers = list(categories.values())
        owners, owned = sum(layers[1:], []), sum(layers[:-1], list(categories)[:-1])
        return rf"each (?:{one_of(owners)})'s (?:{one_of(owned)})(?![A-Za-z])"

    def find_categories(self, question):
        """The categories of a question in our own names, lowest layer first, as far as it mentions them."""
        for world in WORLDS:
            found = {}
            for category, groups in world.items():
                names = [name for name in sum(groups, [])
                         if name in question and re.search(rf"\b{name}\b", question)]
                if names:
                    found[category] = names
            if len(found) > 1 and re.search(self.names(found), question):
                return found
        raise ValueError("line 1: the names are not ours; give the question's categories as well")

    def read_premise(self, line, names):
        """A premise -> Node, or None."""
        match = re.fullmatch(pattern(self.premise, name=names), line)
        if not match:
            return None
        name, text = match["name"], match["text"]
        said = re.match("(?:([0-9]{1,99})(?: (more than|times) )?)?(?:the (sum|difference) of )?", text)
        constant, link, kind = int(said[1]) if said[1] else None, said[2] or "", said[3] or ""
        parents = re.findall(names, text)
        right_count = {"": len(parents) <= 1, "difference": len(parents) == 2, "sum": len(parents) >= 2}[kind]
        linked = bool(link) == (constant is not None and bool(parents))
        node = describe(name, constant, link, kind, parents)
        return node if right_count and linked and node.text == text else None

    def read_implied(self, nodes, categories):
        """What the structure graph implies that these described quantities span: name -> Node."""
        layers = list(categories.values())
        pairs = [pair for lower, upper in zip(layers, layers[1:]) for pair in product(upper, lower)]
        edges = [(owner, item) for owner, item in pairs if quantity(owner, item) in nodes]
        return implied_nodes(categories, edges)

    def read_line(self, text, names):
        """A step's line -> Step, or None. It reads the released generator's wordings as well, in sentences:

        the first quantity named is the node; "x = ..." in the last sentence is the equation, "it equals ..."
        an analysis, another sentence that names quantities a reflection, any other belongs to the opening."""
        quantities = re.findall(names, text)
        if not quantities or re.search(r"<[0-9]+>", text):  # a mark of its own would be taken for one of ours
            return None
        numbers = count()  # quantities become <0>, <1> ...: a name may hold letters, dots and spaces
        masked = re.sub(names, lambda _: f"<{next(numbers)}>", text)
        # "- Let x be the number of <0>. But <1> must be known first, so x has to wait.", or
        # "- Let x be the number of <0>. It equals 2 more than <1>. So x = 2 + y = 2 + 3 = 5."

        def unmask(text):
            return re.sub(r"<([0-9]+)>", lambda match: quantities[int(match[1])], text)

        first, *sentences = re.split(r"(?<=\.) ", masked)
        head, link, analysis, equation, missing = [first], "", "", "", ()
        for i, sentence in enumerate(sentences, 1):
            match = re.fullmatch(r"(?:(.*?) )?([A-Za-z] = [^=].*)\.", sentence)
            if match and i == len(sentences):
                link, equation = match[1] or "", match[2]
            elif match := re.fullmatch(r".*\b[Ii]t equals (.+)\.", sentence):
                if analysis:  # a second one: the first would go unchecked
                    return None
                analysis = unmask(match[1])
            elif "<" in sentence:
                if missing:
                    return None
                missing = tuple(quantities[int(k)] for k in re.findall(r"<([0-9]+)>", sentence))
            else:
                head.append(sentence)
        if first.count("<") > 1 or any("=" in words for words in (*head, link)):
            return None  # it says more than that a step begins, and nobody would check it
        letters = re.findall(r"(?<![\w'<])([A-Za-z])(?![\w'>])", " ".join(head))
        letter = equation[:1] or (letters[0] if letters else "")
        if not letter or (letters and letters[0] != letter) or bool(equation) == bool(missing):
            return None
        subgoal = has_subgoals(equation, self)
        return Step(quantities[0], letter, unmask(" ".join(head)), link, analysis, subgoal, missing, equation)


# ----------------------------------------------------------------- 5. The second task: PromptBench arithmetic
# A tree: each inner node adds, subtracts or multiplies two nodes or squares one; every leaf is given. A
# redundancy unit is a separate tree of two levels. Names serve as letters, and the equation goes straight to
# its value: writing out the numbers in between is what subgoal computation adds.
NAMES = ["".join(letters) for letters in product("abcdefgh", repeat=3)]  # no name is a word of the templates
GIVEN = "The value of {x} is {value}"
COMPUTED = (("+", "{x} gets its value by adding together the value of {a} and {b}"),
            ("-", "{x} gets its value by subtracting the value of {b} from the value of {a}"),
            ("*", "{x} gets its value by multiplying together the value of {a} and {b}"),
            ("*", "{x} gets its value by squaring the value that {a} has"))


def draw_tree(rng, depth, names, nodes):
    """Add a random tree with `depth` levels to `nodes`, parents first -> the name of its root."""
    name = names.pop()
    if depth == 1:
        value = rng.randint(1, 10)
        nodes[name] = Node(name, (value,), GIVEN.format(x=name, value=value))
        return name
    symbol, template = rng.choice(COMPUTED)
    a = draw_tree(rng, depth - 1, names, nodes)
    b = draw_tree(rng, depth - 1, names, nodes) if "{b}" in template else a
    nodes[name] = Node(name, (a, symbol, b), template.format(x=name, a=a, b=b))
    return name


def draw_promptbench(rng, depth=4, redundancy=(0, 8), max_answer=1000, max_value=None, names=len(NAMES)):
    """One draw -> a Problem, or a string that says why it was rejected. names: how many names may occur."""
    names, nodes, extra = rng.sample(NAMES[:names], names), {}, rng.randint(*redundancy)
    target = draw_tree(rng, depth, names, nodes)
    values = solve({name: node.formula for name, node in nodes.items()})
    if reason := too_large(values, target, max_answer, max_value):
        return reason
    for _ in range(extra):
        draw_tree(rng, 2, names, nodes)
    problem = Problem("", values[target], target, nodes, task="promptbench", depth=depth, redundancy=extra,
                      ops=sum(nodes[name].operations for name in values))
    return finish(problem, list(values), rng)


class PromptBench:
    """PromptBench arithmetic; what each name means stands at IGSM."""
    draw = staticmethod(draw_promptbench)
    options = ("depth", "redundancy", "names", "max_answer", "max_value")
    level, hardness = "depth", "redundancy"
    record = ("depth", "redundancy")

    premise = "{text}."
    question = "What is the value of {name}?"
    step = "Let's solve "
    openings = ("Let's solve {name},",)
    links = ("",)
    stop = ""
    analysis = "given that {text},"
    reflection = "but {missing} must be known first, so {x} has to wait."
    letters = ""     # the names are letters enough
    numbers = False  # aab = aac + aad = 5

    line = re.compile(pattern(openings[0], name="[a-z]+")
                      + f"(?: {pattern(analysis, text='[^,]+')})?"
                      + " (?:(?P<equation>(?P=name) = [^,]+)|"
                      + pattern(reflection, missing="[a-z]+(?: and [a-z]+)?", x="(?P=name)") + ")")

    def harder(self, options):
        return {"redundancy": [20, 22]}

    def ask(self, target):
        return self.question.format(name=target)

    def read_asked(self, line):
        match = re.fullmatch(pattern(self.question, name="[a-z]+"), line)
        return match and match["name"]

    def names(self, categories):
        return "[a-z]+"

    def find_categories(self, question):
        return {}

    def read_premise(self, line, names):
        text = line.removesuffix(".")
        if match := re.fullmatch(pattern(GIVEN, x=names, value="-?[0-9]{1,99}") + r"\.", line):
            return Node(match["x"], (int(match["value"]),), text)
        for symbol, template in COMPUTED:
            if match := re.fullmatch(pattern(template, x=names, a=names, b=names) + r"\.", line):
                b = match["b"] if "{b}" in template else match["a"]
                return Node(match["x"], (match["a"], symbol, b), text)
        return None

    def read_implied(self, nodes, categories):
        return {}

    def read_line(self, text, names):
        match = self.line.fullmatch(text)
        if not match:
            return None
        name, equation, missing = match["name"], match["equation"] or "", match["missing"]
        return Step(name, name, self.openings[0].format(name=name), "", match["text"] or "",
                    has_subgoals(equation, self), tuple(missing.split(" and ")) if missing else (), equation)


TASKS = {"igsm": IGSM(), "promptbench": PromptBench()}


# ------------------------------------------------------------------------ 6. Writing a problem and its answer
def line_kind(line):
    """What a line of an answer in our wording shows: "reflection", "analysis", "subgoal" or "" (none)."""
    task = next((task for task in TASKS.values() if line.startswith(task.step)), None)
    if task is None:
        return ""
    if line.endswith(task.reflection.rpartition("}")[2]):
        return "reflection"
    if task.analysis.partition("{")[0] in line:
        return "analysis"
    return "subgoal" if has_subgoals(line, task) else ""


def open_step(problem, node, letter, rng):
    """A step on `node` in one of the wordings."""
    task = TASKS[problem.task]
    return Step(node, letter, rng.choice(task.openings).format(x=letter, name=node), rng.choice(task.links))


def new_letter(problem, node, taken, rng):
    """A letter for a node that has none yet, or None where all are taken."""
    free = [x for x in TASKS[problem.task].letters or [node] if x not in taken]
    return rng.choice(free) if free else None


def in_order(steps):
    """The same steps in the tidy wording: one opening, one link, and letters a, b, c ... as they appear."""
    letters = dict(zip(dict.fromkeys(step.node for step in steps), LETTERS))
    return [step._replace(letter=letters[step.node], link=IGSM.links[0],
                          head=IGSM.openings[1].format(x=letters[step.node], name=step.node))
            for step in steps]


def worded_like(original, edited):
    """Edited steps, in the tidy wording (only iGSM has one) if the steps of the original answer are in it."""
    igsm = all(step.head.startswith(IGSM.step) for step in original)
    return in_order(edited) if igsm and original == in_order(original) else edited


def show(tokens):
    """A formula as text: (9, "*", "(", 0, "-", 3, ")") -> "9 * (0 - 3)"."""
    return " ".join(map(str, tokens)).replace("( ", "(").replace(" )", ")")


def subgoal_chain(numbers):
    """The sides that one operation per "=" adds to an equation, down to its value.

    >>> subgoal_chain((13, "+", 5, "+", 6))
    [(18, '+', 6), (24,)]
    """
    sides = []
    while len(numbers) > 1:
        numbers = reduce_once(numbers)
        sides.append(numbers)
    return sides


def write_response(problem, steps):
    """Steps -> the whole assistant turn (`<think>` ... `</answer>`)."""
    task, letters, values, lines = TASKS[problem.task], {s.node: s.letter for s in steps}, {}, []
    for step in steps:
        parts = [step.head]
        if step.analysis:
            parts.append(task.analysis.format(text=step.analysis))
        if step.missing:
            parts.append(task.reflection.format(missing=listed(step.missing), x=step.letter))
        else:
            formula = problem.nodes[step.node].formula
            numbers = tuple(values.get(t, t) for t in formula)
            sides = [step.letter, show(letters.get(t, t) for t in formula)]
            if step.subgoal or task.numbers:
                sides.append(show(numbers))
            if step.subgoal:
                sides += map(show, subgoal_chain(numbers))
            values[step.node] = evaluate(numbers)
            sides.append(str(values[step.node]))
            parts.append(f"{step.link} {' = '.join(dict.fromkeys(sides))}{task.stop}".lstrip())
        lines.append(" ".join(parts))
    return "\n".join(["<think>", *lines, ANSWER.format(value=problem.answer)])


def finish(problem, order, rng, tidy=False):
    """Put a drawn problem into words: the question, and the plain answer that takes its steps in this order.

    tidy: letters in order of appearance (a, b, c ...) and always the same wording."""
    task = TASKS[problem.task]
    lines = [task.premise.format(name=n.name, text=n.text) for n in problem.nodes.values() if n.text]
    rng.shuffle(lines)
    problem.question = "\n".join([*lines, task.ask(problem.target)])
    letters = rng.sample(task.letters, len(order)) if task.letters else order
    steps = [open_step(problem, q, x, rng) for q, x in zip(order, letters)]
    problem.response = write_response(problem, in_order(steps) if tidy else steps)
    return problem


# --------------------------------------------------------------------------------- 7. Reading a question back
LARGEST = 10**100  # no quantity may reach this: a hostile question that squares and squares would never end
MOST_NODES = 400    # implied ones included: recursion over them stays far from Python's limit of 1,000 calls
MOST_PARENTS = 100  # of one node; our own problems have at most 217 nodes, and 8 parents of one
LONGEST = 200_000   # bytes of a record; our own have at most 30,000
LONGEST_LINE = 5_000  # characters of a question's line: more would keep a regular expression busy


def read_question(question, categories=None):
    """The problem's DAG from its text alone (Algorithm 1, line 1): a Problem without `response`.

    categories: {category: [items]}, lowest layer first; None: found among our own names. Raises ValueError
    naming the line where the text breaks the grammar, contradicts itself, defines too little or too much."""
    *premises, asked = lines = question.strip("\n").split("\n")
    if long := [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]:
        raise ValueError(f"line {long[0]}: over {LONGEST_LINE:,} characters")
    last = f"line {len(premises) + 1}"
    name = next((name for name, task in TASKS.items() if task.read_asked(asked)), "igsm")
    task, nodes = TASKS[name], {}
    categories = categories or task.find_categories(question)
    items = sum(categories.values(), [])
    if len(items) > MOST_NODES or len(set(items)) < len(items):
        raise ValueError(f"line 1: the categories hold over {MOST_NODES} items, or one twice")
    names = task.names(categories)
    for number, line in enumerate(premises, 1):
        node = task.read_premise(line, names)
        if not node:
            raise ValueError(f"line {number}: not a premise over the problem's names: '{line[:200]}'")
        if node.name in nodes:
            raise ValueError(f"line {number}: '{node.name}' is defined twice")
        nodes[node.name] = node
    target = task.read_asked(asked)
    if not target:
        raise ValueError(f"{last}: not a question: '{asked[:200]}'")
    try:
        implied = task.read_implied(nodes, categories)
        for number, clash in enumerate(nodes, 1):
            if clash in implied:
                raise ValueError(f"line {number}: '{clash}' is implied, it cannot be set as well")
        add_implied(nodes, implied, [target])
    except KeyError as missing:
        where = next((i for i, line in enumerate(premises, 1) if missing.args[0] in line), len(premises) + 1)
        raise ValueError(f"line {where}: '{missing.args[0]}' is neither described nor implied") from None
    values = read_values(nodes, last)
    return Problem(question, values[target], target, nodes, ops=count_operations(nodes, target),
                   categories=categories, task=name)


def count_operations(nodes, target):
    """The operations of all nodes that the target needs."""
    return sum(nodes[name].operations for name in needed_nodes(nodes, target))


def read_values(nodes, where):
    """Nodes that come from a text -> {name: value}. Raises ValueError, naming `where`, if they have none."""
    if len(nodes) > MOST_NODES or any(node.degree > MOST_PARENTS for node in nodes.values()):
        raise ValueError(f"{where}: over {MOST_NODES} quantities, or one computed from over {MOST_PARENTS}")
    try:
        order = needed_nodes(nodes, *nodes)
    except ValueError as error:
        raise ValueError(f"{where}: the premises run in a circle: {error}") from None
    values = {}
    for name in order:
        values[name] = evaluate(nodes[name].formula, values)
        if abs(values[name]) >= LARGEST:
            raise ValueError(f"{where}: '{name}' grows beyond 10^100")
    return values


# -------------------------------------------------------------------------------------- 8. Checking an answer
def read_lines(problem, response):
    """(line number, Step) of each step line before </think>; None for Step where the line is malformed or has
    an "=" and is no step. Other lines are prose: the released records begin and end with some."""
    task = TASKS[problem.task]
    names = task.names(problem.categories)
    for number, text in enumerate(response.partition("</think>")[0].split("\n"), 1):
        if text.startswith(task.step):  # a line of many thousand characters is no step, and slow to search
            yield number, task.read_line(text, names) if len(text) <= 5000 else None
        elif "=" in text:
            yield number, None


def read_steps(problem, response):
    """The steps of an answer, to be edited and given to `write_response`. Raises ValueError with the line."""
    steps = []
    for number, step in read_lines(problem, response):
        if step is None or step.node not in problem.nodes:
            line = response.split("\n")[number - 1]
            raise ValueError(f"line {number}: not a step: '{line[:200]}'")
        steps.append(step)
    return steps


class Fault(NamedTuple):
    line: int
    kind: str    # "format", "order", "retrieval", "arithmetic" or "answer"
    reason: str
    behavior: str = ""  # "reflection" or "analysis", where that is what went wrong


@dataclass
class Report:
    """What an answer does. error: its first fault; the counts stop there."""
    error: Fault = None
    steps: int = 0
    reflections: int = 0
    analyses: int = 0
    subgoals: int = 0   # steps that carry out one operation per "=", beyond what the plain answer writes
    redundant: int = 0  # steps that the answer does not need
    locked: int = 0     # lines that begin on a locked quantity; without a fault, as many as reflections
    equations: int = 0  # of steps on ready quantities; without a fault, as many as steps
    restated: int = 0   # those equations that an analysis precedes
    analysed: int = 0   # those steps that an analysis precedes; without a fault, as many as restated

    @property
    def ok(self):
        return self.error is None


class Mistake(Exception):
    """Mistake(kind, reason) or Mistake(kind, reason, behavior): what ends a check."""


OPERAND = "(?:-?[0-9]{1,100}|[A-Za-z]+)"
SUM = f"{OPERAND}(?: [-+*] {OPERAND})*"
BRACKET = rf"(?<![^ (])\({SUM}\)(?![^ )])"  # an innermost one; beside it only a space or a bracket


def read_side(text):
    """One side of an equation as tokens, or None: "9 * (0 - 3)" -> (9, "*", "(", 0, "-", 3, ")")."""
    tokens = re.findall(r"-?[0-9]+|[A-Za-z]+|\S", text)
    if len(tokens) >= 100:  # it would take long to evaluate
        return None
    for _ in range(text.count("(")):  # from the inside out, a bracket becomes a number in its place
        text = re.sub(BRACKET, "0", text)
    if not re.fullmatch(SUM, text):
        return None
    return tuple(int(t) if t[-1].isdigit() else t for t in tokens)


def same_function(a, b):
    """Whether two formulas agree as functions of their names, whatever their text.

    An answer may write a premise's formula in another order, with other brackets or as another chain of
    products: about one step in six of the released records differs from our rendering, and all are right.
    Tried at two random points of 60-bit numbers, where different formulas agree with a chance below 1e-15."""
    rng, names = Random(0), sorted({t for t in a + b if isinstance(t, str) and t not in SYMBOLS})
    points = [{name: rng.getrandbits(60) for name in names} for _ in range(2)]
    return all(evaluate(a, point) == evaluate(b, point) for point in points)


def symbols_left(tokens):
    """How many + - * a side still holds."""
    return sum(t in ("+", "-", "*") for t in tokens)


def one_step(side, after):
    """Whether `after` is `side` with one operation carried out, any that stands between two numbers."""
    for i in range(len(side) - 2):
        a, symbol, b = side[i:i + 3]
        if isinstance(a, int) and isinstance(b, int) and symbol not in ("(", ")"):
            value, before, behind = (evaluate((a, symbol, b)),), side[:i], side[i + 3:]
            if before[-1:] + behind[:1] == ("(", ")") and after == before[:-1] + value + behind[1:]:
                return True
            if after == before + value + behind:
                return True
    return False


def check_equation(node, equation, letters, values, task, subgoal):
    """The equation of a step on `node` -> (its value, whether it computes subgoals). Raises Mistake.

    letters, values: name -> letter, name -> value of what is known; subgoal: each "=" must do one step."""
    sides = [read_side(side) for side in equation.split(" = ")]
    if None in sides or len(sides) < 2 or len(sides[-1]) > 1 or not isinstance(sides[-1][0], int):
        raise Mistake("format", "the equation cannot be read")
    name_of = {letters[name]: name for name in values}
    formula = tuple(name_of.get(t, t) for t in sides[1])  # letters -> names
    used = {t for t in formula if isinstance(t, str)} - set(SYMBOLS)
    for t in formula:
        if t in used and t not in values:
            raise Mistake("format", f"the letter {t} has no value")
    if used != set(node.parents) or not same_function(formula, node.formula):
        raise Mistake("retrieval", f"{show(sides[1])} is not what the problem says of '{node.name}'")
    numbers = sides[2:] if used else sides[1:]  # without letters, sides[1] is the first of numbers itself
    if any(isinstance(t, str) and t not in SYMBOLS for side in numbers for t in side):
        raise Mistake("format", "letters and numbers are mixed")
    if len(numbers) > 1 and numbers[0] != tuple(values.get(t, t) for t in formula):
        raise Mistake("retrieval", "the numbers are not the values of the letters")
    truth = evaluate(node.formula, values)
    for side in numbers:
        if evaluate(side) != truth:
            raise Mistake("arithmetic", f"{show(side)} is not {truth}")
    single = symbols_left(numbers[0]) == symbols_left(formula) and all(map(one_step, numbers, numbers[1:]))
    if subgoal and not single:
        raise Mistake("arithmetic", "more than one operation in an equality")
    return truth, single and has_subgoals(equation, task)


def check_line(problem, step, letters, values, report):
    """Everything about a step but its equation; counts those on locked quantities. Raises Mistake."""
    if step is None:
        raise Mistake("format", "the line is not a step")
    if step.node not in problem.nodes:
        raise Mistake("retrieval", f"the problem does not define '{step.node}'")
    node = problem.nodes[step.node]
    if letters.get(node.name, step.letter) != step.letter:
        raise Mistake("format", f"'{node.name}' was called {letters[node.name]} before")
    if node.name not in letters and step.letter in letters.values():
        raise Mistake("format", f"the letter {step.letter} is taken")
    if step.analysis and step.analysis != node.text:
        raise Mistake("retrieval", f"this is not the premise of '{node.name}'", "analysis")
    unsolved = [p for p in node.parents if p not in values]  # if there are any, the node is locked
    report.locked += bool(unsolved)
    if step.missing and not unsolved:
        raise Mistake("order", f"a reflection on '{node.name}', which can be solved", "reflection")
    if step.missing and set(step.missing) != set(unsolved):
        raise Mistake("order", "the reflection names other quantities than the unsolved parents of "
                               f"'{node.name}'", "reflection")
    if not step.missing and node.name in values:
        raise Mistake("order", f"'{node.name}' is solved already")
    if not step.missing and unsolved:
        raise Mistake("order", f"'{node.name}' comes before '{unsolved[0]}', which it needs")


def check_trace(problem, response, subgoal=False):
    """Walk an answer step by step -> Report with the first fault or the counts; it never raises.

    An answer is *sound* if there is no fault: every "=" is true; letters are new, known and consistent; a
    node comes after its parents; a reflection stands on a locked node and names the parents that are
    unsolved, all of them and only those; an analysis restates that node's own premise; with `subgoal`, each
    "=" carries out one operation; the target is the last step; the boxed answer is right."""
    if not problem.nodes:  # it comes from a file and was read without its graph
        try:
            problem = replace(read_question(problem.question, problem.categories), answer=problem.answer)
        except ValueError as error:
            return Report(Fault(0, "format", f"the question cannot be read: {error}"))
    report, task, number = Report(), TASKS[problem.task], 0
    needed = needed_nodes(problem.nodes, problem.target)
    letters, values, last = {}, {}, None
    try:
        for number, step in read_lines(problem, response):
            check_line(problem, step, letters, values, report)
            letters[step.node] = step.letter
            report.analyses += bool(step.analysis)
            if step.missing:
                report.reflections += 1
                continue
            node, last = problem.nodes[step.node], step.node
            report.equations += 1
            report.restated += bool(step.analysis)
            values[last], subgoals = check_equation(node, step.equation, letters, values, task, subgoal)
            report.steps += 1
            report.analysed += bool(step.analysis)
            report.subgoals += subgoals
            report.redundant += last not in needed
        number = response.count("\n") + 1
        if last != problem.target:
            raise Mistake("order", "the last step is not the quantity that is asked for")
        if read_answer(response) is None:
            raise Mistake("format", "no single boxed integer inside <answer> after </think>")
        if read_answer(response) != problem.answer:
            raise Mistake("answer", f"the boxed answer is not {problem.answer}")
    except Mistake as mistake:
        report.error = Fault(number, *mistake.args)
    return report


def read_answer(response):
    """The boxed integer of a response; None unless there is just one, in <answer></answer> after </think>.

    The opening <think> may be missing, since the prompt ends with it."""
    thought, closed, ending = response.strip().removeprefix("<think>").partition("</think>")
    ending = ending.strip()
    if not closed or any(tag in thought for tag in ("\\boxed", "<think>", "<answer>", "</answer>")):
        return None
    if not ending.startswith("<answer>") or not ending.endswith("</answer>"):
        return None
    body = ending[len("<answer>"):-len("</answer>")]
    match = re.search(r"\\boxed\{(-?[0-9]{1,100})\}", body)
    if not match or body.count("\\boxed") != 1 or any(tag in body for tag in ("think>", "answer>")):
        return None
    return int(match[1])


def reward(response, answer):
    """1.0 if the response ends in the right boxed integer (see `read_answer`), else 0.0."""
    return float(read_answer(response) == answer)


def trl_reward(completions, answer, **_):
    """`reward` as TRL calls it (reward_funcs): texts or conversations and the column `answer` -> floats."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [reward(text, int(number)) for text, number in zip(texts, answer)]


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """`reward` as verl calls it (custom_reward_function) -> a float."""
    return reward(solution_str, int(ground_truth))


# ----------------------------------------------------------------------- 9. Many problems, none of them twice
# Training, validation and test problems come from one generator. Their text keeps them apart: its hash says
# which split a problem belongs to, and draws that belong to another split are dropped.
SPLITS = {"train": range(0, 60), "val": range(60, 80), "test": range(80, 100)}  # fingerprint modulo 100
CHUNK = 64  # draws that a worker makes at a time


def fingerprint(question):
    """64 bits of the sorted premises and the question line: the same problem in any order of premises."""
    *premises, asked = question.replace("\r\n", "\n").strip().split("\n")
    text = "\n".join(sorted(premises) + [asked])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(question):
    """The split that a problem belongs to, whatever the seed and the order of its premises."""
    return next(name for name, share in SPLITS.items() if fingerprint(question) % 100 in share)


def draw_chunk(task, seed, split, options, start):
    """Draws start ... start + 63 of a seed: for each (fingerprint, problem) or (None, why it was dropped)."""
    results = []
    for i in range(start, start + CHUNK):
        rng = Random(seed << 40 | i)  # each draw has its own, so that any worker can make it
        problem = TASKS[task].draw(rng, **options)
        key = None if isinstance(problem, str) else fingerprint(problem.question)
        if key is not None and split and key % 100 not in SPLITS[split]:
            key, problem = None, "another split"
        results.append((key, problem))
    return results


def follow_parent():
    """A worker ends with its parent, whatever ended that. Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=end, daemon=True).start()


def draw_chunks(draw, workers):
    """draw(0), draw(64), draw(128) ... without end, in this order, made by `workers` processes."""
    starts = count(0, CHUNK)
    if workers == 1:
        yield from map(draw, starts)  # it never ends: what follows is for several
    with ProcessPoolExecutor(workers, initializer=follow_parent) as pool:
        try:
            while True:  # in rounds, since `map` starts on all that it is given
                yield from pool.map(draw, islice(starts, 16 * workers))
        except (OSError, BrokenExecutor) as error:  # one was killed, or could not be started
            for worker in multiprocessing.active_children():  # those that were begun would wait for ever
                worker.kill()
            raise InputError(f"--workers {workers}: a process failed ({error}); use fewer") from None


def keep_distinct(chunks, rejected):
    """The problems of these chunks, none twice; `rejected` counts why the others were dropped."""
    seen, dry = set(), 0  # dry: draws since the last problem
    for chunk in chunks:
        for key, problem in chunk:
            dry += 1
            if key is None:
                rejected[problem] += 1
            elif key in seen:
                rejected["a duplicate"] += 1
            else:
                seen.add(key)
                dry = 0
                yield problem
        if dry > 20_000:
            raise InputError(f"no new problem in {dry:,} draws (mostly: {rejected.most_common(1)[0][0]}): "
                             "ask for fewer problems, more operations or a larger bound")


def generate(task="igsm", ops=(15, 20), seed=0, split="train", workers=1, rejected=None, **options):
    """Endless iterator of distinct problems; same arguments, same problems, whatever `workers`.

    ops: (low, high) operations (where the task has them); split: a key of SPLITS, or None for all problems;
    rejected: a Counter that collects why draws were dropped; options: what `draw_problem` (igsm) or
    `draw_promptbench` takes. Raises InputError where nothing can be drawn."""
    if task not in TASKS:
        raise InputError(f"--task {task}: use {' or '.join(TASKS)}")
    if split is not None and split not in SPLITS:
        raise InputError(f"--split {split}: use {', '.join(SPLITS)}")
    options = options | ({"ops": tuple(ops)} if "ops" in TASKS[task].options else {})
    check_options(options)
    chunks = draw_chunks(partial(draw_chunk, task, seed, split, options), workers)
    return keep_distinct(chunks, Counter() if rejected is None else rejected)


# ---------------------------------------------------------- 10. What every script needs: errors, flags, files
class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: what, where, and what to do."""


def run_cli(main):
    """Run a script's main(): what goes wrong outside the code - bad input, a full disk - ends in one line on
    stderr and exit code 2, never in a traceback. SIGTERM is taken as Ctrl-C; the outputs are given up."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: it was closed before we began
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # it may know ASCII alone
        setattr(sys, name, stream)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `python data.py | head` is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    except (InputError, OSError, UnicodeError) as error:
        where = f"{error.filename}: " if getattr(error, "filename", None) else ""
        print(f"error: {where}{getattr(error, 'strerror', None) or error}", file=sys.stderr)
        raise SystemExit(2)
    finally:
        signal.signal(signal.SIGTERM, before)
        release()


class Parser(argparse.ArgumentParser):
    """argparse whose own errors are one sentence like all others, and that takes no abbreviated flag."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], allow_abbrev=False)

    def error(self, message):
        raise InputError(message.removeprefix("argument "))

    def refuse(self, args, flags, why):
        """Raise where one of `flags` was given that another flag makes meaningless."""
        for flag in flags:
            if getattr(args, flag) != self.get_default(flag):
                advice = "leave one of the two out" if why.startswith("with ") else "leave it out"
                raise InputError(f"--{flag.replace('_', '-')} has no effect {why}: {advice}")

    def format_help(self):
        for action in self._actions:  # what is not said otherwise
            words, default = action.help or "", action.default
            if default not in (None, argparse.SUPPRESS) and default is not False and "default" not in words:
                action.help = f"{words} (default: %(default)s)".strip()
        return super().format_help()

    def parse_args(self, *arguments):
        args = super().parse_args(*arguments)
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):  # an unset variable in a shell script
                raise InputError(f"--{name.replace('_', '-')} '': leave it out, or give it a value")
        return args


def number(kind, low, high, words):
    """An argparse type: a number of this kind in low ... high. NaN and infinity lie in no range."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    return parse


positive_int = number(int, 1, 2**31 - 1, "a whole number of at least 1 (and below 2^31)")
natural = number(int, 0, 2**31 - 1, "a whole number of at least 0 (and below 2^31)")
positive = number(float, 5e-324, math.inf, "a number above 0")
not_negative = number(float, 0, math.inf, "a number of at least 0")
share = number(float, 0, 1, "a number from 0 to 1")

# The tiny models' problems, and what is harder in their out-of-distribution (OOD) test.
TINY = {"igsm": dict(ops=(6, 8), size=(4, 5), tidy=True, max_value=100),
        "promptbench": dict(depth=4, redundancy=(0, 2), names=64, max_value=1000)}
TINY_OOD = {"igsm": dict(ops=(8, 10), size=(5, 6)), "promptbench": dict(redundancy=(3, 5))}
RANGES = {"ops": (1, 30), "size": (2, 30), "depth": (1, 7), "redundancy": (0, 30), "names": (1, len(NAMES)),
          "max_answer": (1, math.inf), "max_value": (1, math.inf)}  # what may be asked for


def add_problem_flags(parser):
    """The flags that say which problems are drawn, for all scripts that draw some. RANGES bounds them;
    `problem_options` says what happens without one."""
    add, pair = parser.add_argument, dict(type=int, nargs=2, metavar=("LO", "HI"))
    add("--task", default="igsm", choices=list(TASKS), help="which kind of problem; without --ops or --depth "
        f"the tiny model's: {', '.join(f'{task} {as_flags(options)}' for task, options in TINY.items())}")
    add("--ops", **pair, help="igsm: operations a problem; a given value and a copy count as one")
    add("--size", **pair, help="igsm: premises a problem; default: follows the operations")
    add("--tidy", action="store_true", default=None,
        help="igsm: letters in order of appearance and one wording (a small model's answers)")
    add("--depth", type=int, help="promptbench: levels of the tree")
    add("--redundancy", **pair, help="promptbench: trees that the answer does not need, distractors; default "
        "with --depth: 0 8")
    add("--names", type=int, help=f"promptbench: how many names; default with --depth: {len(NAMES)}")
    add("--max-answer", type=int, help="drop problems with |answer| >= this; default: 1000")
    add("--max-value", type=int,
        help="drop problems with a |value| >= this, on the way or at its end (a small model's arithmetic)")


def as_flags(options):
    """Options of `generate` as flags: "--ops 6 8 --tidy"."""
    flags = []
    for name, value in options.items():
        flags.append(f"--{name.replace('_', '-')}")
        if value is not True:
            flags += map(str, [value] if isinstance(value, int) else value)
    return " ".join(flags)


def task_flag(task):
    """" --task ..." for the next command, where it is not the default."""
    return "" if task == "igsm" else f" --task {task}"


def check_options(options):
    """Raise InputError where options of `generate` ask for what cannot be drawn."""
    for name, (low, high) in RANGES.items():
        given = options.get(name)
        numbers = [given] if isinstance(given, int) else list(given or ())
        if numbers != sorted(numbers) or not all(low <= x <= high for x in numbers):
            bounds = f"be at least {low}" if high == math.inf else f"lie in {low} ... {high}"
            order = ", the lower number first" if len(numbers) > 1 else ""
            raise InputError(f"--{name.replace('_', '-')} {show(numbers)}: must {bounds}{order}")
    most = (2 ** options.get("depth", 4) - 1) + 3 * max(options.get("redundancy", (0, 8)))
    if most > options.get("names", most):
        raise InputError(f"--names {options['names']}: a problem of this depth and redundancy can hold "
                         f"{most} quantities; raise it")


def is_tiny(args):
    """Whether neither --ops (igsm) nor --depth (promptbench) was given: then the tiny model's problems."""
    return getattr(args, TASKS[args.task].level) is None


def problem_options(args):
    """Those flags, checked, as keyword arguments of `generate`. Without --ops (igsm) or --depth (promptbench)
    what is not given is as in the tiny model's problems."""
    for task, other in TASKS.items():
        for name in other.options:
            if name not in TASKS[args.task].options and getattr(args, name) is not None:
                raise InputError(f"--{name} has no effect with --task {args.task}: leave it out, or pass "
                                 f"--task {task}")
    usual = TINY.get(args.task, {}) if is_tiny(args) else {}
    given = {name: getattr(args, name) for name in TASKS[args.task].options}
    options = usual | {name: value for name, value in given.items() if value is not None}
    check_options(options)
    return {"task": args.task} | options


RECORD = [rb'\{"id": [^,]*, "task": "']  # how a file of problems begins
OURS = ".bridge-"  # in the name of what we leave beside a file for a while: others' temporaries are not ours
CLAIMED = []       # the lock files of this run's outputs; the system unlocks them when the process dies


def claim(outputs, inputs=()):
    """Before anything is computed: make sure of all outputs. They can be written, are no input and no other
    output, take no foreign file's place, and no other run writes them until `release`.

    outputs: [(flag, path or None, how a file there may begin, regular expressions; None: a new folder)];
    inputs: [(what it is, path or None)]. Raises InputError."""
    taken = {place(path): what for what, path in inputs if path}
    for flag, path, starts in outputs:
        if not path:
            continue
        if place(path) in taken:
            raise InputError(f"{flag} {path}: is {taken[place(path)]} as well; name another one")
        taken[place(path)] = f"{flag} {path}"
        folder, name = os.path.split(os.path.abspath(path))
        try:
            if os.path.exists(path) and not is_ours(path, starts):
                raise InputError(f"{flag} {path}: exists already and is not what this run writes; "
                                 f"name a new {'file' if starts else 'folder'}")
            with tempfile.NamedTemporaryFile(dir=folder, prefix=name + OURS, suffix=".tmp"):
                pass
            lock(os.path.join(folder, f".{name}{OURS}lock"))
        except BlockingIOError:
            raise InputError(f"{flag} {path}: another run is writing it; name another one or wait") from None
        except OSError as error:
            raise InputError(f"{flag} {path}: cannot be written: {error.strerror or error}") from None


def place(path):
    """The same for all names of one file or folder: its inode, or where it will be made."""
    with suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return os.path.realpath(path)


def is_ours(path, starts):
    """Whether what is there is an empty folder (starts None), or a file that is empty or begins like this."""
    if starts is None:
        return os.path.isdir(path) and not os.listdir(path)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(1100)
    return not start or any(re.match(words, start, re.S) for words in starts)


def lock(path):
    """Hold the lock file `path` until `release`. Raises BlockingIOError where another process does."""
    while fcntl and all(file.name != path for file in CLAIMED):
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            pass
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return CLAIMED.append(file)
        file.close()  # its last holder has just removed it: once more, with a new one


def release():
    """Give all claimed outputs up."""
    while CLAIMED:
        with suppress(OSError), CLAIMED.pop() as file:
            os.remove(file.name)


def mode_of(path):
    """The permissions of a file, or those that a new one gets."""
    with suppress(OSError):
        return os.stat(path).st_mode & 0o777
    umask = os.umask(0)  # it can be read by setting it alone
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def replacing(path, mode="w"):
    """A temporary file beside `path` that takes its place when the block ends without an error: a crash, a
    full disk or Ctrl-C leaves the old file or the new one, never half a one. Raises InputError where it
    cannot be written."""
    path = os.path.realpath(path)  # what a link leads to is replaced, not the link
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    folder, name = os.path.split(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=folder or ".", prefix=name + OURS, suffix=".tmp")
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, mode_of(path))  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch's own words hide it
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path}: cannot be written: {cause.strerror or cause}") from None
    finally:
        if temporary:
            os.remove(temporary)


def to_record(problem):
    """Problem -> the dict that one JSON line holds."""
    names = ("id", "task", "question", "response", "answer", *TASKS[problem.task].record)
    return {name: getattr(problem, name) for name in names}


def from_record(record, graph=False):
    """A dict -> Problem; graph: read the question back into its DAG, too. Raises ValueError that says why."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    text = json.dumps(record, ensure_ascii=False)
    if len(text.encode()) > LONGEST:  # half a surrogate pair, which JSON can write, is a UnicodeEncodeError
        raise ValueError(f"a record of over {LONGEST:,} bytes")
    task = record.get("task", "igsm")
    if task not in list(TASKS):
        raise ValueError(f"the field 'task' must be {' or '.join(TASKS)}")
    problem = Problem(None, None, task=task)
    for name in ("id", "question", "response", "answer", *TASKS[task].record):
        setattr(problem, name, record.get(name, getattr(problem, name)))
    for kind, words, names in ((str, "text", ("question", "response")),
                               (int, "an integer", ("answer", "ops", "depth", "redundancy"))):
        for name in names:
            if type(getattr(problem, name)) is not kind:  # `isinstance` would take True for an integer
                raise ValueError(f"the field '{name}' must be {words}")
    layers = problem.categories.values() if isinstance(problem.categories, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in layers):
        raise ValueError("the field 'categories' must hold lists of names")
    if graph:
        try:
            read = read_question(problem.question, problem.categories)
        except ValueError as error:
            raise ValueError(f"its question, {error}") from None
        if read.task != task:
            raise ValueError(f"the question is one of {read.task}, the field 'task' says {task}")
        if read.answer != problem.answer:
            raise ValueError(f"the question's answer is {read.answer}, not {problem.answer}")
        problem.target, problem.nodes, problem.categories = read.target, read.nodes, read.categories
        problem.ops = record.get("ops", read.ops)
    return problem


def read_problems(path, graph=False):
    """All problems of a JSONL file. Raises InputError that names the file and the first bad line."""
    problems = []
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give a JSONL file as data.py writes it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = from_record(json.loads(line), graph)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}); "
                             "give one problem a line, as data.py writes them") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        problem.id = number if problem.id is None else problem.id
        problems.append(problem)
    if not problems:
        raise InputError(f"{path}: the file holds no problem")
    return problems


def write_records(path, records):
    """Write records as JSON lines; the file appears whole or not at all. Returns how many were written."""
    written = 0
    with replacing(path) as file:
        for written, record in enumerate(records, 1):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return written


# --------------------------------------------------------------------- 11. Showing a problem, and the command
def draw_picture(problem):
    """The DAG as text: from the target down to what is given, then what the answer does not need."""
    formulas = {q: problem.nodes[q].formula for q in needed_nodes(problem.nodes, *problem.nodes)}
    values, lines, seen = solve(formulas), [], set()

    def draw(name, prefix, below):
        node = problem.nodes[name]
        if name in seen:
            lines.append(f"{prefix}{name} (see above)")
            return
        seen.add(name)
        numbers = show(values.get(t, t) for t in node.formula)
        sides = " = ".join(dict.fromkeys([name, numbers, str(values[name])]))
        lines.append(f"{prefix}{sides}{'' if node.text else ' (implied)'}")
        for parent in node.parents:
            last = parent == node.parents[-1]
            draw(parent, f"{below} +-- ", f"{below}{'     ' if last else ' |   '}")

    draw(problem.target, "", "")
    if len(seen) < len(formulas):
        lines.append("not needed:")
    for name in reversed(formulas):
        if name not in seen:
            draw(name, "", "")
    return "\n".join(lines)


class Summary:
    """Counts what passes through, so that a data set describes itself."""

    def __init__(self):
        self.start, self.rows, self.rejected = time.time(), [], Counter()

    def watch(self, problems):
        for problem in problems:
            needed = needed_nodes(problem.nodes, problem.target)
            implied = any(not problem.nodes[name].text for name in needed)
            self.rows.append((problem.answer, problem.ops, len(problem.question.split()),
                              len(problem.response.split()), len(problem.nodes) > len(needed), implied))
            yield problem

    def __str__(self):
        answers, ops, asked, told, redundant, implied = zip(*self.rows)
        n = len(answers)
        draws, duplicates = n + self.rejected.total(), self.rejected["a duplicate"]
        reasons = ", ".join(f"{reason} {k / draws:.1%}" for reason, k in self.rejected.most_common()
                            if reason != "a duplicate")
        ranges = {"below 0": (-math.inf, -1), "0": (0, 0), "1-9": (1, 9), "10-99": (10, 99),
                  "100 up": (100, math.inf)}
        shares = ", ".join(f"{name} {sum(low <= x <= high for x in answers) / n:.1%}"
                           for name, (low, high) in ranges.items())
        common, times = Counter(answers).most_common(1)[0]
        return (f"{n} problems, {n / (time.time() - self.start):.0f} a second\n"
                f"of {draws} draws rejected: {reasons or 'none'}; {duplicates} duplicates dropped\n"
                f"words: question {sum(asked) / n:.0f}, answer {sum(told) / n:.0f}\n"
                f"with redundant premises {sum(redundant) / n:.0%}, "
                f"with an implied quantity {sum(implied) / n:.0%}\n"
                f"answers: {shares}; always answering {common} would score {times / n:.1%}\n"
                "operations: " + ", ".join(f"{x}: {k}" for x, k in sorted(Counter(ops).items())))


def main():
    parser = Parser(__doc__)
    add_problem_flags(parser)
    add = parser.add_argument
    add("--n", type=positive_int, default=1, help="how many problems")
    add("--seed", type=natural, default=0, help="same seed, same problems")
    add("--split", choices=list(SPLITS), default="train", help="which share of all problems to draw from")
    add("--workers", type=number(int, 1, 256, "a whole number from 1 to 256"), default=1,
        help="processes; the output does not depend on it")
    add("--out", help="JSONL file to write; without it problems are printed")
    args = parser.parse_args()
    claim([("--out", args.out, RECORD)])
    summary = Summary()
    stream = generate(seed=args.seed, split=args.split, workers=args.workers, rejected=summary.rejected,
                      **problem_options(args))
    problems = summary.watch(islice(stream, args.n))
    if args.out:
        write_records(args.out, (to_record(problem) | {"id": i} for i, problem in enumerate(problems)))
        print(summary)
    else:
        for problem in problems:
            print(f"{problem.question}\n\n{draw_picture(problem)}\n\n{problem.response}\n")


# ---------------------------------------------------------------------------------------------- 12. The names
# Four worlds of four layers, lowest first: a Farm has Barns, a Barn has Crates, a Crate has Fruit. A layer is
# a category with four groups of five names; a problem draws one group a layer.
def read_group(text):
    """Five names: "Tin Pine ... Crate" -> Tin Crate, Pine Crate ...; with commas, as they stand."""
    *adjectives, noun = text.split(" ")
    return text.split(", ") if "," in text else [f"{adjective} {noun}" for adjective in adjectives]


WORLDS = [
    {"Fruit": ["Red Apple, Green Pear, Yellow Quince, Purple Plum, Black Cherry",
               "Sweet Mango, Ripe Papaya, Small Banana, Spiny Durian, Round Lychee",
               "Blood Orange, Sour Lemon, Key Lime, Pink Pomelo, Bitter Grapefruit",
               "Wild Strawberry, Blue Bilberry, White Currant, Dewy Blackberry, Golden Raspberry"],
     "Crate": ["Tin Wicker Pine Cedar Steel Crate", "Flat Deep Slotted Lined Waxed Tray",
               "Willow Straw Wire Rope Birch Basket", "Jute Linen Paper Cotton Hemp Sack"],
     "Barn": ["Tall Old Stone Round Tarred Barn", "North South East West Middle Shed",
              "Upper Lower Dry Airy Hidden Loft", "Cold Vaulted Brick Dark Long Cellar"],
     "Farm": ["Willow Maple Juniper Hazel Rowan Farm", "Brook Meadow Ridge Glen Heath Homestead",
              "Sunny Windy Misty Quiet Frosty Orchard", "Fox Hare Badger Otter Heron Croft"]},
    {"Instrument": ["Brass Sextant, Pocket Compass, Star Globe, Depth Sounder, Signal Lamp",
                    "Sea Chart, Tide Table, Log Book, Flag Code, Pilot Guide",
                    "Ice Pick, Boat Hook, Splicing Awl, Caulking Iron, Sail Needle",
                    "Tin Whistle, Squeeze Box, Bass Drum, Hand Bell, Fog Horn"],
     "Cabin": ["Captain Guest Crew Corner Radio Cabin", "Fore Aft Main Cargo Coal Hold",
               "Ship Galley, Ship Pantry, Ship Bakery, Ship Infirmary, Ship Laundry",
               "Chart Map Engine Boiler Pump Room"],
     "Ship": ["Sea Swallow, Grey Pelican, White Albatross, Swift Petrel, Bold Cormorant",
              "Iron Duchess, Jolly Baroness, Proud Countess, Merry Princess, Silent Empress",
              "River Canal Coal Sand Timber Barge", "Polar Herring Shrimp Mackerel Oyster Trawler"],
     "Harbor": ["Amber Coral Quartz Jade Opal Harbor", "Gull Seal Whale Crab Eel Bay",
                "Lantern Anchor Barrel Customs Ferry Quay", "Granite Slate Chalk Basalt Marble Wharf"]},
    {"Book": ["Star Road World Moon Ocean Atlas", "Ghost Love Short Spy Bedtime Story",
              "Cook Song Hymn Sketch Phrase Book", "Latin Greek Sanskrit Gothic Norse Grammar"],
     "Shelf": ["Oak Walnut Beech Ash Ebony Shelf", "Glass Locked Rolling Carved Narrow Case",
               "Window Corridor Swivel Ladder Folding Rack", "First Second Third Fourth Fifth Drawer"],
     "Hall": ["Reading Music Lecture Echo Mirror Hall", "Blue Crimson Ivory Olive Silver Salon",
              "Winter Summer Spring Autumn Garden Wing", "Newton Kepler Curie Darwin Noether Annex"],
     "Library": ["City Village Harbor Castle Abbey Library", "Law Trade Royal Parish Naval Archive",
                 "Hill Dale Marsh Fen Moor College", "Tower Bridge Gate Market Mill Collection"]},
    {"Gem": ["Ruby Topaz Garnet Onyx Beryl Ring", "Sapphire Emerald Amethyst Agate Citrine Brooch",
             "Gold Copper Nickel Bronze Electrum Coin", "Fern Snail Fish Shark Beetle Fossil"],
     "Cabinet": ["Velvet Lacquer Rosewood Mahogany Bamboo Cabinet", "Tall Low Wall Table Island Vitrine",
                 "Sealed Painted Studded Leather Banded Chest", "Rose Lily Tulip Iris Poppy Alcove"],
     "Gallery": ["Ancient Modern Desert Jungle Arctic Gallery", "Lion Tiger Bear Wolf Eagle Court",
                 "Marble Copper Glazed Painted Sunken Rotunda", "Alpha Beta Gamma Delta Sigma Room"],
     "Museum": ["Mining Clock Railway Postal Science Museum", "Lake Forest River Valley Summit Pavilion",
                "Lotus Acorn Thistle Clover Laurel Institute", "Ember Cinder Flint Spark Torch Palace"]},
]
WORLDS = [{category: list(map(read_group, groups)) for category, groups in world.items()} for world in WORLDS]


if __name__ == "__main__":
    run_cli(main)
