"""Chapter 1. Problems: word problems that are graphs in disguise.

    python data.py                                          # one problem, its graph, its answer
    python data.py --ops 15 20 --n 2000 --seed 100 --out train.jsonl
    python data.py --task promptbench --depth 4 --redundancy 0 8 --n 5000 --out train.jsonl

A problem is a directed acyclic graph (DAG). Every *quantity* is a node; an edge runs to it from each
quantity that it is computed from. The question states one premise per line in random order, and the
answer walks the graph from what is given to what is asked:

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

"each Old Barn's Crate" is *implied*: no premise states it, it is the sum over Old Barn's crates. The file
follows a problem's life: structure graph, dependency graph, text, answer, reading the text back into its
graph, checking an answer step by step, JSONL. Source: Ye et al. 2024 ("Physics of Language Models 2.1"), as
modified by BRIDGE (arXiv 2505.18917): no modulo, large answers dropped, redundant premises. A second task,
PromptBench arithmetic (Zhu et al. 2024, "DyVal"), differs in its text functions alone.

Where we depart from the released generator and the paper:
1. the names are our own, and a name never makes a premise ambiguous (theirs are split at "'s ");
2. the size of the structure follows the number of operations, so 1 operation works as well as 30;
3. a hash of the text decides whether a problem is for training, validation or test, whatever the seed;
4. PromptBench names are random (in DyVal their order gives the solution away) and "subtracting B from A" is A - B.
"""
import argparse, hashlib, json, math, os, re, sys, tempfile, time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, islice, product
from random import Random
from typing import NamedTuple

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Four worlds of four layers; each layer is a category with four groups of five names. A problem draws one
# group a layer. Lowest layer first: a Farm has Barns, a Barn has Crates, a Crate has Fruit.
WORLDS = [
    {"Fruit": ["Red Apple, Green Pear, Yellow Quince, Purple Plum, Black Cherry",
               "Sweet Mango, Ripe Papaya, Small Banana, Spiny Durian, Round Lychee",
               "Blood Orange, Sour Lemon, Key Lime, Pink Pomelo, Bitter Grapefruit",
               "Wild Strawberry, Blue Bilberry, White Currant, Dewy Blackberry, Golden Raspberry"],
     "Crate": ["Tin Crate, Wicker Crate, Pine Crate, Cedar Crate, Steel Crate",
               "Flat Tray, Deep Tray, Slotted Tray, Lined Tray, Waxed Tray",
               "Willow Basket, Straw Basket, Wire Basket, Rope Basket, Birch Basket",
               "Jute Sack, Linen Sack, Paper Sack, Cotton Sack, Hemp Sack"],
     "Barn": ["Tall Barn, Old Barn, Stone Barn, Round Barn, Tarred Barn",
              "North Shed, South Shed, East Shed, West Shed, Middle Shed",
              "Upper Loft, Lower Loft, Dry Loft, Airy Loft, Hidden Loft",
              "Cold Cellar, Vaulted Cellar, Brick Cellar, Dark Cellar, Long Cellar"],
     "Farm": ["Willow Farm, Maple Farm, Juniper Farm, Hazel Farm, Rowan Farm",
              "Brook Homestead, Meadow Homestead, Ridge Homestead, Glen Homestead, Heath Homestead",
              "Sunny Orchard, Windy Orchard, Misty Orchard, Quiet Orchard, Frosty Orchard",
              "Fox Croft, Hare Croft, Badger Croft, Otter Croft, Heron Croft"]},
    {"Instrument": ["Brass Sextant, Pocket Compass, Star Globe, Depth Sounder, Signal Lamp",
                    "Sea Chart, Tide Table, Log Book, Flag Code, Pilot Guide",
                    "Ice Pick, Boat Hook, Splicing Awl, Caulking Iron, Sail Needle",
                    "Tin Whistle, Squeeze Box, Bass Drum, Hand Bell, Fog Horn"],
     "Cabin": ["Captain Cabin, Guest Cabin, Crew Cabin, Corner Cabin, Radio Cabin",
               "Fore Hold, Aft Hold, Main Hold, Cargo Hold, Coal Hold",
               "Ship Galley, Ship Pantry, Ship Bakery, Ship Infirmary, Ship Laundry",
               "Chart Room, Map Room, Engine Room, Boiler Room, Pump Room"],
     "Ship": ["Sea Swallow, Grey Pelican, White Albatross, Swift Petrel, Bold Cormorant",
              "Iron Duchess, Jolly Baroness, Proud Countess, Merry Princess, Silent Empress",
              "River Barge, Canal Barge, Coal Barge, Sand Barge, Timber Barge",
              "Polar Trawler, Herring Trawler, Shrimp Trawler, Mackerel Trawler, Oyster Trawler"],
     "Harbor": ["Amber Harbor, Coral Harbor, Quartz Harbor, Jade Harbor, Opal Harbor",
                "Gull Bay, Seal Bay, Whale Bay, Crab Bay, Eel Bay",
                "Lantern Quay, Anchor Quay, Barrel Quay, Customs Quay, Ferry Quay",
                "Granite Wharf, Slate Wharf, Chalk Wharf, Basalt Wharf, Marble Wharf"]},
    {"Book": ["Star Atlas, Road Atlas, World Atlas, Moon Atlas, Ocean Atlas",
              "Ghost Story, Love Story, Short Story, Spy Story, Bedtime Story",
              "Cook Book, Song Book, Hymn Book, Sketch Book, Phrase Book",
              "Latin Grammar, Greek Grammar, Sanskrit Grammar, Gothic Grammar, Norse Grammar"],
     "Shelf": ["Oak Shelf, Walnut Shelf, Beech Shelf, Ash Shelf, Ebony Shelf",
               "Glass Case, Locked Case, Rolling Case, Carved Case, Narrow Case",
               "Window Rack, Corridor Rack, Swivel Rack, Ladder Rack, Folding Rack",
               "First Drawer, Second Drawer, Third Drawer, Fourth Drawer, Fifth Drawer"],
     "Hall": ["Reading Hall, Music Hall, Lecture Hall, Echo Hall, Mirror Hall",
              "Blue Salon, Crimson Salon, Ivory Salon, Olive Salon, Silver Salon",
              "Winter Wing, Summer Wing, Spring Wing, Autumn Wing, Garden Wing",
              "Newton Annex, Kepler Annex, Curie Annex, Darwin Annex, Noether Annex"],
     "Library": ["City Library, Village Library, Harbor Library, Castle Library, Abbey Library",
                 "Law Archive, Trade Archive, Royal Archive, Parish Archive, Naval Archive",
                 "Hill College, Dale College, Marsh College, Fen College, Moor College",
                 "Tower Collection, Bridge Collection, Gate Collection, Market Collection, Mill Collection"]},
    {"Gem": ["Ruby Ring, Topaz Ring, Garnet Ring, Onyx Ring, Beryl Ring",
             "Sapphire Brooch, Emerald Brooch, Amethyst Brooch, Agate Brooch, Citrine Brooch",
             "Gold Coin, Copper Coin, Nickel Coin, Bronze Coin, Electrum Coin",
             "Fern Fossil, Snail Fossil, Fish Fossil, Shark Fossil, Beetle Fossil"],
     "Cabinet": ["Velvet Cabinet, Lacquer Cabinet, Rosewood Cabinet, Mahogany Cabinet, Bamboo Cabinet",
                 "Tall Vitrine, Low Vitrine, Wall Vitrine, Table Vitrine, Island Vitrine",
                 "Sealed Chest, Painted Chest, Studded Chest, Leather Chest, Banded Chest",
                 "Rose Alcove, Lily Alcove, Tulip Alcove, Iris Alcove, Poppy Alcove"],
     "Gallery": ["Ancient Gallery, Modern Gallery, Desert Gallery, Jungle Gallery, Arctic Gallery",
                 "Lion Court, Tiger Court, Bear Court, Wolf Court, Eagle Court",
                 "Marble Rotunda, Copper Rotunda, Glazed Rotunda, Painted Rotunda, Sunken Rotunda",
                 "Alpha Room, Beta Room, Gamma Room, Delta Room, Sigma Room"],
     "Museum": ["Mining Museum, Clock Museum, Railway Museum, Postal Museum, Science Museum",
                "Lake Pavilion, Forest Pavilion, River Pavilion, Valley Pavilion, Summit Pavilion",
                "Lotus Institute, Acorn Institute, Thistle Institute, Clover Institute, Laurel Institute",
                "Ember Palace, Cinder Palace, Flint Palace, Spark Palace, Torch Palace"]},
]
WORLDS = [{category: [group.split(", ") for group in groups] for category, groups in world.items()} for world in WORLDS]


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: what, where, and what to do."""


def run_cli(main):
    """Run a script's main(): bad input ends in one line on stderr and exit code 2, never in a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    except BrokenPipeError:  # `python data.py | head` is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse whose own errors are one sentence like all others, and that takes no abbreviated flag."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], allow_abbrev=False)

    def error(self, message):
        raise InputError(message.removeprefix("argument "))


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


positive_int = number(int, 1, math.inf, "a whole number of at least 1")
natural = number(int, 0, math.inf, "a whole number of at least 0")
positive = number(float, 5e-324, math.inf, "a number above 0")
not_negative = number(float, 0, math.inf, "a number of at least 0")
share = number(float, 0, 1, "a number from 0 to 1")


@contextmanager
def replacing(path, mode="w"):
    """A temporary file beside `path` that takes its place when the block ends without an error: a crash, a full disk or
    Ctrl-C leaves the old file or the new one, never half a one. Raises InputError where it cannot be written."""
    path, text = os.fspath(path), {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=os.path.basename(path), suffix=".tmp")
        with os.fdopen(handle, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary:
            os.remove(temporary)


# ------------------------------------------------------------------------------------------ the graph
SYMBOLS = ("+", "-", "*", "(", ")")
LARGEST = 10**100  # no quantity may reach this: a hostile question that squares and squares would never end


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
        return max(1, self.degree - 1)


@dataclass
class Problem:
    question: str                 # premises, one a line, then the question line
    answer: int
    target: str                   # name of the node that is asked for
    nodes: dict                   # name -> Node: described and implied, needed and redundant
    response: str = ""            # <think> ... </think> <answer> ... </answer>
    ops: int = 0                  # operations of the nodes that the answer needs
    categories: dict = field(default_factory=dict)  # igsm: category -> items drawn, lowest layer first
    task: str = "igsm"
    id: object = None
    depth: int = 0                # promptbench: levels of the tree, and how many trees it does not need
    redundancy: int = 0


def reduce_once(tokens):
    """Carry out one operation: innermost bracket first, then * before + and -, then left to right.

    >>> reduce_once((9, "*", "(", 0, "-", 3, ")"))
    (9, '*', -3)
    """
    end = tokens.index(")") if ")" in tokens else len(tokens)
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


def needed_nodes(nodes, *targets):
    """Names of the nodes that `targets` depend on, themselves included, parents before children."""
    order, state, stack = [], {}, list(reversed(targets))
    while stack:
        name = stack[-1]
        if state.get(name) == "done":
            stack.pop()
            continue
        if name not in nodes:
            raise ValueError(f"'{name}' is used but never defined")
        waiting = [p for p in nodes[name].parents if state.get(p) != "done"]
        if not waiting:
            state[name] = "done"
            order.append(name)
        elif state.get(name) == "open":
            raise ValueError(f"'{name}' depends on itself")
        else:
            state[name] = "open"
            stack.extend(reversed(waiting))
    return order


# ----------------------------------------------------------------------------------- structure graph
def draw_structure(rng, size):
    """Layers of named items and `size` edges between neighbouring layers -> (categories, edges).

    Every item has at least one child (unless lowest) and one parent (unless highest), so that every implied
    quantity is defined. edges: list of (owner, item), the instance parameters "each owner's item"."""
    world = rng.choice(WORLDS)
    for _ in range(200):
        widths = [rng.randint(2, 4) for _ in range(rng.randint(2, 4))]
        pairs = list(zip(widths, widths[1:]))
        if sum(map(max, pairs)) <= size <= sum(a * b for a, b in pairs):
            break
    else:  # a very small structure: one owner, `size` items
        widths = [min(size, 4), 1]
    bottom = rng.randint(0, 4 - len(widths))
    names = list(world)[bottom:bottom + len(widths)]
    layers = [rng.sample(rng.choice(world[name]), width) for name, width in zip(names, widths)]
    edges, spare = [], []
    for lower, upper in zip(layers, layers[1:]):
        rows = [rng.sample(layer, len(layer)) for layer in (lower, upper)]
        base = {(rows[1][i % len(upper)], rows[0][i % len(lower)]): 0 for i in range(max(len(upper), len(lower)))}
        edges += base
        spare += [(o, i) for o in upper for i in lower if (o, i) not in base]
    edges += rng.sample(spare, max(0, min(size - len(edges), len(spare))))
    return dict(zip(names, layers)), edges


def quantity(owner, item):
    return f"each {owner}'s {item}"


def implied_nodes(categories, edges):
    """Every "each X's <Category>" that a structure graph defines: name -> Node.

    One layer down it is the sum of X's items of that category; further down, the sum over X's children Y of
    (each X's Y) * (each Y's <Category>). Summands stand in the order in which `categories` lists them."""
    names, layers = list(categories), list(categories.values())
    edges, nodes = set(edges), {}
    for level in range(1, len(layers)):
        for owner in layers[level]:
            children = [y for y in layers[level - 1] if (owner, y) in edges]
            for below in range(level):
                formula = []
                for y in children:
                    formula += ["+", quantity(owner, y)]
                    if below < level - 1:
                        formula += ["*", quantity(y, names[below])]
                name = quantity(owner, names[below])
                if formula and all(p in nodes for p in formula[3::4] if below < level - 1):
                    nodes[name] = Node(name, tuple(formula[1:]), "")
    return nodes


# ---------------------------------------------------------------------------------- dependency graph
def listed(names):
    """("A", "B", "C") -> "A, B and C"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


class Rule(NamedTuple):
    """What one premise says: [constant] [more than | times] [a quantity | the sum of ... | the difference of ...]"""
    constant: object  # int or None
    link: str         # "more than", "times" or ""
    kind: str         # "sum", "difference" or ""
    parents: tuple

    def formula(self):
        body = tuple(t for p in self.parents for t in ("-" if self.kind == "difference" else "+", p))[1:]
        if not self.link:
            return body or (self.constant,)
        if self.link == "more than":
            return (self.constant, "+") + body
        return (self.constant, "*") + (("(",) + body + (")",) if self.kind else body)

    def text(self):
        body = f"the {self.kind} of {listed(self.parents)}" if self.kind else listed(self.parents)
        return " ".join(part for part in ("" if self.constant is None else str(self.constant), self.link, body) if part)


def draw_rule(rng, parents, constant):
    """A premise over these parents, with a written constant or without."""
    kind = "" if len(parents) < 2 else "sum" if len(parents) > 2 else rng.choice(("sum", "difference"))
    link = rng.choice(("more than", "times")) if constant and parents else ""
    return Rule(rng.randint(0, 9) if constant else None, link, kind, tuple(rng.sample(parents, len(parents))))


def draw_needed(rng, edges, implied, ops):
    """The part of the dependency graph that the answer needs -> (order, {instance: (parents, constant)}) or None.

    In stages: (1) implied quantities with all that they rest on, (2) more instance parameters, (3) an order with
    the edges that it takes, (4) in-degrees raised until the operations are exactly `ops`."""
    limit = rng.randint((ops + 1) // 2, ops)  # what stages 1 and 2 may spend; stage 4 spends the rest
    needed, spent = choose_needed(rng, [quantity(*edge) for edge in edges], implied, limit)
    ordered = order_needed(rng, needed, implied, ops, spent)
    return ordered and raise_degrees(rng, *ordered, ops)


def choose_needed(rng, instances, implied, limit):
    """Stages 1 and 2 -> (quantities, operations they cost at least)."""
    needed, spent = {}, 0
    described = {q: Node(q, (0,), "") for q in instances}
    for name in rng.sample(list(implied), rng.randint(0, min(3, len(implied)))):
        extra = [q for q in needed_nodes(implied | described, name) if q not in needed]
        cost = sum(implied[q].operations if q in implied else 1 for q in extra)
        if spent + cost <= limit:
            needed.update(dict.fromkeys(extra))
            spent += cost
    free = [q for q in instances if q not in needed]
    more = rng.sample(free, min(len(free), max(limit - spent, 0 if needed else 1)))
    return [*needed, *more], spent + len(more)


def order_needed(rng, waiting, implied, ops, spent):
    """Stage 3: an order drawn from the target backwards, so that every quantity serves a later one.

    -> (order, {instance: parents}, operations spent), or None where a quantity finds nothing to serve."""
    users = Counter(p for q in waiting if q in implied for p in implied[q].parents)  # implied ones not placed yet
    served, parents, reverse = set(), {q: [] for q in waiting if q not in implied}, []
    while waiting:
        open_slots = [q for q in reverse if q in parents and (len(parents[q]) < 2 or (len(parents[q]) < 3 and spent < ops))]
        ready = [q for q in waiting if not users[q] and (q in served or open_slots or not reverse)]
        if not ready:
            return None
        q = rng.choice(ready)
        if reverse and q not in served:
            child = rng.choice(open_slots)
            spent += len(parents[child]) >= 2
            parents[child].append(q)
        for p in implied[q].parents if q in implied else ():
            users[p] -= 1
            served.add(p)
        reverse.append(q)
        waiting.remove(q)
    return reverse[::-1], parents, spent


def raise_degrees(rng, order, parents, spent, ops):
    """Stage 4 -> (order, {instance: (parents, constant)}) with exactly `ops` operations, in-degree at most 4, or None.

    A node with in-degree 1 takes a second edge at no cost; every further one costs an operation."""
    constant = {q: not parents[q] for q in parents}
    place = {q: i for i, q in enumerate(order)}
    growing = [q for q in parents if place[q] > 0]
    for q in growing:
        if len(parents[q]) == 1 and rng.random() < 0.7:
            constant[q] = True
    while spent < ops:
        if not growing:
            return None
        q = rng.choice(growing)
        degree = len(parents[q]) + constant[q]
        earlier = [p for p in order[:place[q]] if p not in parents[q]]
        if degree == 4 or (not earlier and constant[q]):
            growing.remove(q)
            continue
        if not constant[q] and (not earlier or rng.random() < 0.3):
            constant[q] = True
        else:
            parents[q].append(rng.choice(earlier))
        spent += degree >= 2
    return order, {q: (parents[q], constant[q]) for q in parents}


def draw_redundant(rng, edges, implied, order):
    """Rules for the instance parameters that the answer does not need, so that all are described."""
    pool, rules = list(order), {}
    rest = [q for q in (quantity(*edge) for edge in edges) if q not in order]
    for q in rng.sample(rest, len(rest)):
        degree = rng.choice((0, 1, 1, 2, 2, 3)) if pool else 0
        chosen = rng.sample(pool, min(degree, len(pool)))
        rules[q] = draw_rule(rng, chosen, not chosen or (len(chosen) < 4 and rng.random() < 0.5))
        pool.append(q)
        known = set(pool)  # an implied quantity may serve once all that it rests on is described
        pool += [a for a, node in implied.items() if a not in known and known.issuperset(node.parents)]
    return rules


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
    rules = {q: draw_rule(rng, *drawn[q]) for q in drawn}
    # Numbers before words: most rejected draws never become text.
    values = solve({q: rules[q].formula() if q in rules else implied[q].formula for q in order})
    if reason := too_large(values, order[-1], max_answer, max_value):
        return reason
    rules.update(draw_redundant(rng, edges, implied, order))
    nodes = {q: Node(q, rule.formula(), rule.text()) for q, rule in rules.items()}
    add_implied(nodes, implied, order)
    return finish(Problem("", values[order[-1]], order[-1], nodes, ops=wanted, categories=categories), order, rng, tidy)


def solve(formulas):
    """{name: formula}, parents before children -> {name: value}."""
    values = {}
    for name, formula in formulas.items():
        values[name] = evaluate(formula, values)
    return values


def too_large(values, target, max_answer, max_value):
    """Why a draw with these values is rejected, or ""."""
    if max_value and any(abs(value) >= max_value for value in values.values()):
        return "a value too large"
    return "answer too large" if abs(values[target]) >= max_answer else ""


def add_implied(nodes, implied, wanted=()):
    """Add to `nodes` the implied quantities that `wanted` or a premise names. Raises KeyError for one that is neither."""
    mentioned = [p for node in nodes.values() for p in node.parents] + list(wanted)
    for name in mentioned:  # it grows on the way: an implied quantity can rest on implied ones
        if name not in nodes:
            nodes[name] = implied[name]
            mentioned += implied[name].parents


# ---------------------------------------------------------------------------------------------- text
PREMISE = "The number of {name} equals {text}."
QUESTION = "How many {item} does each {owner} have?"
OPENINGS = ("- Let {x} be the number of {name}.",
            "- The number of {name} is written {x}.",
            "- Now call the number of {name} {x}.")
LINKS = ("Then", "So")
TIDY_OPENING = OPENINGS[1]
ANALYSIS = "It equals {text}."
REFLECTION = "But {missing} must be known first, so {x} has to wait."
ANSWER = "</think>\n<answer>\nThe final answer is \\boxed{{{value}}}.\n</answer>"


def ask(target):
    owner, item = target.removeprefix("each ").split("'s ")
    return QUESTION.format(item=item, owner=owner)


def finish(problem, order, rng, tidy=False):
    """Put a drawn problem into words: the question, and the vanilla answer that takes its steps in this order.

    tidy: letters in order of appearance (a, b, c ...) and always the same wording."""
    words = TASKS[problem.task]
    lines = [words.premise.format(name=n.name, text=n.text) for n in problem.nodes.values() if n.text]
    rng.shuffle(lines)
    problem.question = "\n".join([*lines, words.ask(problem.target)])
    letters = rng.sample(words.alphabet, len(order)) if words.alphabet else order
    steps = [open_step(problem, q, x, rng) for q, x in zip(order, letters)]
    problem.response = write_response(problem, in_order(steps) if tidy else steps)
    return problem


class Step(NamedTuple):
    """One line of an answer. A reflection is a step with `missing` parents and no equation."""
    node: str
    letter: str
    head: str               # "- Let x be the number of each Old Barn's Crate."
    link: str = "Then"
    analysis: object = False  # restate the premise before the equation; when read, what was restated
    subgoal: bool = False   # one operation per "="
    missing: tuple = ()
    equation: str = ""      # as it was read: "x = 5 + y = 5 + 3 = 8"


def new_letter(problem, node, taken, rng):
    """A letter for a node that has none yet, or None where all are taken."""
    free = [x for x in TASKS[problem.task].alphabet or [node] if x not in taken]
    return rng.choice(free) if free else None


def open_step(problem, node, letter, rng):
    """A step on `node` in one of the wordings."""
    words = TASKS[problem.task]
    return Step(node, letter, rng.choice(words.openings).format(x=letter, name=node), rng.choice(words.links))


def in_order(steps):
    """The same steps in the tidy wording, with the letters a, b, c ... in order of appearance."""
    letters = dict(zip(dict.fromkeys(step.node for step in steps), LETTERS))
    return [step._replace(letter=letters[step.node], link="Then",
                          head=TIDY_OPENING.format(x=letters[step.node], name=step.node)) for step in steps]


def is_tidy(steps):
    """Whether an answer is worded so already: when it is edited, the edited one should be, too."""
    return bool(steps) and steps == in_order(steps)


def show(tokens):
    """A formula as text: (9, "*", "(", 0, "-", 3, ")") -> "9 * (0 - 3)"."""
    return " ".join(map(str, tokens)).replace("( ", "(").replace(" )", ")")


def write_response(problem, steps):
    """Steps -> the whole assistant turn (`<think>` ... `</answer>`)."""
    words, letters, values, lines = TASKS[problem.task], {s.node: s.letter for s in steps}, {}, []
    for step in steps:
        node, parts = problem.nodes[step.node], [step.head]
        if step.analysis:
            parts.append(words.analysis.format(name=node.name, text=node.text))
        if step.missing:
            parts.append(words.reflection.format(missing=listed(step.missing), x=step.letter))
        else:
            numbers = tuple(values.get(t, t) for t in node.formula)
            sides = [step.letter, show(letters.get(t, t) for t in node.formula)]
            if step.subgoal or words.numbers:
                sides.append(show(numbers))
            while step.subgoal and len(numbers) > 1:
                numbers = reduce_once(numbers)
                sides.append(show(numbers))
            values[step.node] = evaluate(numbers)
            sides.append(str(values[step.node]))
            parts.append(f"{step.link} {' = '.join(dict.fromkeys(sides))}{words.stop}".lstrip())
        lines.append(" ".join(parts))
    return "\n".join(["<think>", *lines, ANSWER.format(value=problem.answer)])


# ------------------------------------------------------------------------------- reading a question back
def name_pattern(categories):
    """A regular expression for the quantities that these names can form: "each <item>'s <item or category>"."""
    longest = lambda names: "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    layers = list(categories.values())
    owners, owned = sum(layers[1:], []), sum(layers[:-1], list(categories)[:-1])
    return re.compile(rf"each (?:{longest(owners)})'s (?:{longest(owned)})(?![A-Za-z])")


def find_categories(question):
    """The categories of a question in our own names: one world, lowest layer first, as far as it is mentioned."""
    for world in WORLDS:
        found = {c: [i for group in groups for i in group if re.search(rf"\b{i}\b", question)] for c, groups in world.items()}
        found = {c: items for c, items in found.items() if items}
        if len(found) > 1 and name_pattern(found).search(question):
            return found
    raise ValueError("line 1: the names are not ours; give the question's categories as well")


def read_rule(text, pattern):
    """The text after "equals" -> Rule, or None where it breaks the premise grammar."""
    match = re.match(r"(?:([0-9]{1,99})(?: (more than|times) )?)?(?:the (sum|difference) of )?", text)
    parents = tuple(pattern.findall(text))
    rule = Rule(int(match[1]) if match[1] else None, match[2] or "", match[3] or "", parents)
    right_count = {"": len(parents) <= 1, "difference": len(parents) == 2, "sum": len(parents) >= 2}[rule.kind]
    linked = bool(rule.link) == (rule.constant is not None and bool(parents))
    return rule if right_count and linked and rule.text() == text else None


def read_premise(line, pattern):
    """A premise -> Node, or None."""
    match = re.fullmatch(rf"The number of ({pattern.pattern}) equals (.+)\.", line)
    rule = match and read_rule(match[2], pattern)
    return rule and Node(match[1], rule.formula(), match[2])


def read_asked(line):
    """The question line -> the name of the quantity that is asked for, or None."""
    match = re.fullmatch(r"How many (.+) does each (.+) have\?", line)
    return match and quantity(match[2], match[1])


def read_implied(nodes, categories):
    """What the structure graph implies that these described quantities span."""
    layers = list(categories.values())
    edges = [(o, i) for lower, upper in zip(layers, layers[1:]) for o in upper for i in lower if quantity(o, i) in nodes]
    return implied_nodes(categories, edges)


def read_question(question, categories=None):
    """The problem's DAG from its text alone (Algorithm 1, line 1): a Problem without `response`.

    categories: {category: [items]}, lowest layer first; None: found among our own names. Raises ValueError
    naming the line where the text breaks the grammar, contradicts itself, or leaves a quantity undefined."""
    *premises, asked = question.strip("\n").split("\n")
    task = next((name for name, words in TASKS.items() if words.read_asked(asked)), "igsm")
    words, nodes = TASKS[task], {}
    if task == "igsm" and not categories:
        categories = find_categories(question)
    pattern = words.names(categories)
    for number, line in enumerate(premises, 1):
        node = words.read_premise(line, pattern)
        if not node:
            raise ValueError(f"line {number}: not a premise over the problem's names: '{line[:200]}'")
        if node.name in nodes:
            raise ValueError(f"line {number}: '{node.name}' is defined twice")
        nodes[node.name] = node
    last, target = f"line {len(premises) + 1}", words.read_asked(asked)
    if not target:
        raise ValueError(f"{last}: not a question: '{asked[:200]}'")
    try:
        add_implied(nodes, words.read_implied(nodes, categories), [target])
    except KeyError as missing:
        where = next((i for i, line in enumerate(premises, 1) if missing.args[0] in line), last[5:])
        raise ValueError(f"line {where}: '{missing.args[0]}' is neither described nor implied") from None
    try:
        order = needed_nodes(nodes, *nodes)
    except ValueError as error:
        raise ValueError(f"{last}: the premises run in a circle: {error}") from None
    values = {}
    for name in order:
        values[name] = evaluate(nodes[name].formula, values)
        if abs(values[name]) >= LARGEST:
            raise ValueError(f"{last}: '{name}' grows beyond 10^100")
    ops = sum(nodes[q].operations for q in needed_nodes(nodes, target))
    return Problem(question, values[target], target, nodes, ops=ops, categories=categories or {}, task=task)


# ------------------------------------------------------------------------------------ checking an answer
def read_line(text, pattern):
    """One line starting with "- " -> Step, or None. Works for our wording and for the released generator's."""
    names = []

    def mask(match):  # quantities leave the text first: names may hold letters, dots and spaces
        names.append(match[0])
        return f"<{len(names) - 1}>"

    def unmask(text):
        return re.sub(r"<([0-9]+)>", lambda match: names[int(match[1])], text)

    masked = pattern.sub(mask, text)
    if not names or re.search(r"<[0-9]+>", text):
        return None
    first, *sentences = re.split(r"(?<=\.) ", masked)
    head, link, analysis, equation, missing = [first], "", "", "", ()
    for i, sentence in enumerate(sentences, 1):
        match = re.fullmatch(r"(?:(.*?) )?([A-Za-z] = [^=].*)\.", sentence)
        if match and i == len(sentences):
            link, equation = match[1] or "", match[2]
        elif match := re.fullmatch(r".*\b[Ii]t equals (.+)\.", sentence):
            analysis = unmask(match[1])
        elif "<" in sentence:
            missing = tuple(names[int(k)] for k in re.findall(r"<([0-9]+)>", sentence))
        else:
            head.append(sentence)
    letters = re.findall(r"(?<![\w'<])([A-Za-z])(?![\w'>])", " ".join(head))
    letter = equation[:1] or (letters[0] if letters else "")
    if not letter or (letters and letters[0] != letter) or bool(equation) == bool(missing):
        return None
    return Step(names[0], letter, unmask(" ".join(head)), link, analysis, equation.count(" = ") > 3, missing, equation)


def read_lines(problem, response):
    """(line number, Step or None) for each step line before </think>; None: it starts like a step but is none."""
    words = TASKS[problem.task]
    pattern = words.names(problem.categories)
    for number, text in enumerate(response.partition("</think>")[0].split("\n"), 1):
        if text.startswith(words.step):  # a line of many thousand characters is no step and would take long to search
            yield number, words.read_line(text, pattern) if len(text) <= 5000 else None


def read_steps(problem, response):
    """The steps of an answer, ready to be edited and handed to `write_response`. Raises ValueError with the line."""
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


@dataclass
class Report:
    """What an answer does. error: its first fault; the counts stop there."""
    error: Fault = None
    steps: int = 0
    reflections: int = 0
    analyses: int = 0
    subgoals: int = 0   # steps whose equation carries out one operation per "=", beyond what the plain one writes
    redundant: int = 0  # steps that the answer does not need

    @property
    def ok(self):
        return self.error is None


class Mistake(Exception):
    """Mistake(kind, reason): what ends a check."""


def read_side(text):
    """One side of an equation as tokens ("9 * (0 - 3)" -> (9, "*", "(", 0, "-", 3, ")")), or None if malformed."""
    spaced = text.replace("(", "( ").replace(")", " )").split(" ")
    tokens = tuple(int(t) if re.fullmatch(r"-?[0-9]{1,100}", t) else t for t in spaced)
    depth, operand = 0, True  # operand: an operand (or an opening bracket) must come next
    for t in tokens:
        if t in ("+", "-", "*", ")"):
            depth -= t == ")"
            if operand or depth < 0:
                return None
            operand = t != ")"
        elif not operand or not (t == "(" or isinstance(t, int) or re.fullmatch("[A-Za-z]+", t)):
            return None
        else:
            depth += t == "("
            operand = t == "("
    return tokens if not depth and not operand and len(tokens) < 100 else None  # longer ones take long to evaluate


def same_function(a, b):
    """Whether two formulas agree as functions of their names (at two random points: chance of error < 1e-15)."""
    rng, names = Random(0), sorted({t for t in a + b if isinstance(t, str) and t not in SYMBOLS})
    points = [{name: rng.getrandbits(60) for name in names} for _ in range(2)]
    return all(evaluate(a, point) == evaluate(b, point) for point in points)


def check_equation(node, equation, letters, values, numbered, subgoal):
    """The equation of a step on `node` -> (its value, whether it computes a subgoal). Raises Mistake.

    letters, values: name -> letter, name -> value of what is known; numbered: whether a plain equation of this task
    shows the numbers that it adds up."""
    sides = [read_side(side) for side in equation.split(" = ")]
    if None in sides or len(sides) < 2 or not isinstance(sides[-1][0], int) or len(sides[-1]) > 1:
        raise Mistake("format", "the equation cannot be read")
    solved = {letters[name]: name for name in values}
    formula = tuple(solved.get(t, t) for t in sides[1])
    used = {t for t in formula if isinstance(t, str)} - set(SYMBOLS)
    for t in formula:
        if t in used and t not in values:
            raise Mistake("format", f"the letter {t} has no value")
    if used != set(node.parents) or not same_function(formula, node.formula):
        raise Mistake("retrieval", f"{show(sides[1])} is not what the problem says of '{node.name}'")
    numbers = sides[2:] if used else sides[1:]
    if not numbers or any(isinstance(t, str) and t not in SYMBOLS for side in numbers for t in side):
        raise Mistake("format", "letters and numbers are mixed")
    if len(numbers) > 1 and numbers[0] != tuple(values.get(t, t) for t in formula):
        raise Mistake("retrieval", "the numbers are not the values of the letters")
    truth = evaluate(node.formula, values)
    for side in numbers:
        if evaluate(side) != truth:
            raise Mistake("arithmetic", f"{show(side)} is not {truth}")
    left = [sum(t in ("+", "-", "*") for t in side) for side in numbers]  # operations left to do on each side
    single = all(a - b == 1 for a, b in zip(left, left[1:])) and left[0] == sum(t in ("+", "-", "*") for t in formula)
    if subgoal and not single:
        raise Mistake("arithmetic", "more than one operation in an equality")
    return truth, single and len(left) > 1 + numbered


def check_line(problem, line, letters, values):
    """Everything about a step but its equation. Raises Mistake."""
    if line is None:
        raise Mistake("format", "the line is not a step")
    if line.node not in problem.nodes:
        raise Mistake("retrieval", f"the problem does not define '{line.node}'")
    node = problem.nodes[line.node]
    if letters.get(node.name, line.letter) != line.letter:
        raise Mistake("format", f"'{node.name}' was called {letters[node.name]} before")
    if node.name not in letters and line.letter in letters.values():
        raise Mistake("format", f"the letter {line.letter} is taken")
    if line.analysis and line.analysis != node.text:
        raise Mistake("retrieval", f"this is not the premise of '{node.name}'")
    locked = [p for p in node.parents if p not in values]
    if line.missing and not locked:
        raise Mistake("order", f"a reflection on '{node.name}', which can be solved")
    if line.missing and set(line.missing) != set(locked):
        raise Mistake("order", f"the reflection names other quantities than the unsolved parents of '{node.name}'")
    if not line.missing and node.name in values:
        raise Mistake("order", f"'{node.name}' is solved already")
    if not line.missing and locked:
        raise Mistake("order", f"'{node.name}' comes before '{locked[0]}', which it needs")


def check_trace(problem, response, subgoal=False):
    """Walk an answer step by step -> Report with the first fault or the counts. Never raises, whatever the response.

    Every "=" is true; letters are new, known and consistent; a node comes after its parents; a reflection stands
    on a locked node and names parents that are unsolved, all of them and only those; an analysis restates that
    node's own premise; with `subgoal`, each "=" carries out one operation; the target is the last step; the
    boxed answer is right."""
    if not problem.nodes:  # it comes from a file and was read without its graph
        try:
            problem = replace(read_question(problem.question, problem.categories), answer=problem.answer)
        except ValueError as error:
            return Report(Fault(0, "format", f"the question cannot be read: {error}"))
    report, words, number = Report(), TASKS[problem.task], 0
    needed = set(needed_nodes(problem.nodes, problem.target))
    letters, values, last = {}, {}, None
    try:
        for number, line in read_lines(problem, response):
            check_line(problem, line, letters, values)
            letters[line.node] = line.letter
            report.analyses += bool(line.analysis)
            if line.missing:
                report.reflections += 1
                continue
            node, last = problem.nodes[line.node], line.node
            values[last], single = check_equation(node, line.equation, letters, values, words.numbers, subgoal)
            report.steps += 1
            report.subgoals += single
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


BOXED = re.compile(r"\\boxed\{(-?[0-9]{1,100})\}")


def read_answer(response):
    """The boxed integer of a response, or None unless it is exactly one, inside <answer></answer>, after </think>.

    The opening <think> may be missing, since the prompt ends with it."""
    response = response.strip().removeprefix("<think>")
    thought, closed, ending = response.partition("</think>")
    ending = ending.strip()
    if not closed or "\\boxed" in thought or any(tag in thought for tag in ("<think>", "<answer>", "</answer>")):
        return None
    if not ending.startswith("<answer>") or not ending.endswith("</answer>"):
        return None
    body = ending[len("<answer>"):-len("</answer>")]
    match = BOXED.search(body)
    if not match or body.count("\\boxed") != 1 or any(tag in body for tag in ("think>", "answer>")):
        return None
    return int(match[1])


def reward(response, answer):
    """1.0 if the response ends in the right boxed integer (see `read_answer`), else 0.0."""
    return float(read_answer(response) == answer)


# ------------------------------------------------------------------------- the second task: PromptBench
# A tree: each inner node adds, subtracts or multiplies two nodes or squares one; every leaf is given. A redundancy
# unit is a separate tree of two levels. Names serve as letters, and the equation goes straight to its value:
# writing out the numbers in between is what subgoal computation adds.
OPERATIONS = {"+": "adding together the value of {a} and {b}",
              "-": "subtracting the value of {b} from the value of {a}",
              "*": "multiplying together the value of {a} and {b}",
              "square": "squaring the value that {a} has"}
NAMES = ["".join(letters) for letters in product("abcdefgh", repeat=3)]  # none of them is a word of the templates


def draw_tree(rng, depth, names, nodes):
    """Add a random tree with `depth` levels to `nodes`, parents first -> the name of its root."""
    name = names.pop()
    if depth == 1:
        value = rng.randint(1, 10)
        nodes[name] = Node(name, (value,), f"The value of {name} is {value}")
        return name
    operation = rng.choice(list(OPERATIONS))
    a = draw_tree(rng, depth - 1, names, nodes)
    b = a if operation == "square" else draw_tree(rng, depth - 1, names, nodes)
    text = f"{name} gets its value by {OPERATIONS[operation].format(a=a, b=b)}"
    nodes[name] = Node(name, (a, "*" if operation == "square" else operation, b), text)
    return name


def draw_promptbench(rng, depth=4, redundancy=(0, 8), max_answer=1000, max_value=None, names=len(NAMES)):
    """One draw -> a Problem, or a string that says why the draw was rejected. names: how many of the names may occur."""
    names, nodes, extra = rng.sample(NAMES[:names], names), {}, rng.randint(*redundancy)
    target = draw_tree(rng, depth, names, nodes)
    values, order = solve({name: node.formula for name, node in nodes.items()}), list(nodes)
    if reason := too_large(values, target, max_answer, max_value):
        return reason
    for _ in range(extra):
        draw_tree(rng, 2, names, nodes)
    return finish(Problem("", values[target], target, nodes, task="promptbench", depth=depth, redundancy=extra,
                          ops=sum(nodes[name].operations for name in order)), order, rng)


def read_promptbench_premise(line, pattern):
    """A premise -> Node, or None."""
    if match := re.fullmatch(rf"The value of ({pattern}) is (-?[0-9]{{1,99}})\.", line):
        return Node(match[1], (int(match[2]),), line[:-1])
    for operation, text in OPERATIONS.items():
        form = text.format(a=f"(?P<a>{pattern})", b=f"(?P<b>{pattern})")
        if match := re.fullmatch(rf"({pattern}) gets its value by {form}\.", line):
            a, b = match["a"], match["a" if operation == "square" else "b"]
            return Node(match[1], (a, "*" if operation == "square" else operation, b), line[:-1])
    return None


def read_promptbench_asked(line):
    """The question line -> the name that is asked for, or None."""
    match = re.fullmatch(r"What is the value of ([a-z]+)\?", line)
    return match and match[1]


def read_promptbench_line(text, pattern):
    """One line starting with "Let's solve " -> Step, or None."""
    match = re.fullmatch(rf"(Let's solve ({pattern}),)(?: given that ([^,]+),)?"
                         rf"(?: (\2 = [^,]+)| but ({pattern})(?: and ({pattern}))? must be known first, so \2 has to wait\.)",
                         text)
    if not match:
        return None
    head, name, analysis, equation, *missing = match.groups(default="")
    return Step(name, name, head, "", analysis, equation.count(" = ") > 2, tuple(filter(None, missing)), equation)


class Words(NamedTuple):
    """What one task looks like in words; everything else in this file is the same for both."""
    draw: object
    premise: str
    ask: object           # target -> question line
    step: str             # how a step line starts
    openings: tuple
    links: tuple
    analysis: str
    reflection: str
    stop: str             # after an equation
    numbers: bool         # whether a plain equation puts the numbers in before it gives the value
    alphabet: str         # the letters that stand for quantities; "": the names do
    names: object         # categories -> regular expression of a quantity
    read_premise: object
    read_asked: object
    read_implied: object
    read_line: object


TASKS = {
    "igsm": Words(
        draw_problem, PREMISE, ask, "- ", OPENINGS, LINKS, ANALYSIS, REFLECTION, ".", True,
        LETTERS, name_pattern, read_premise, read_asked, read_implied, read_line),
    "promptbench": Words(
        draw_promptbench, "{text}.", "What is the value of {}?".format, "Let's solve ", ("Let's solve {name},",), ("",),
        "given that {text},", "but {missing} must be known first, so {x} has to wait.", "", False,
        "", lambda categories: "[a-z]+", read_promptbench_premise, read_promptbench_asked, lambda nodes, categories: {},
        read_promptbench_line),
}


# ------------------------------------------------------------------------------------------- many problems
SPLITS = {"train": range(0, 60), "val": range(60, 80), "test": range(80, 100)}
RANGES = {"ops": (1, 30), "size": (2, 30), "depth": (1, 7), "redundancy": (0, 30), "names": (1, len(NAMES))}  # what may be asked for


def fingerprint(question):
    """64 bits of the sorted premises and the question line: the same problem in any order of premises."""
    *premises, asked = question.split("\n")
    text = "\n".join(sorted(premises) + [asked])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(question):
    return next(name for name, share in SPLITS.items() if fingerprint(question) % 100 in share)


def check_options(options):
    """Raise InputError where options of `generate` ask for what cannot be drawn."""
    for name, (low, high) in RANGES.items():
        given = options.get(name)
        numbers = [given] if isinstance(given, int) else list(given or ())
        if numbers != sorted(numbers) or not all(low <= x <= high for x in numbers):
            raise InputError(f"--{name} {show(numbers)}: must lie in {low} ... {high}, the lower number first")
    most = (2 ** options.get("depth", 4) - 1) + 3 * max(options.get("redundancy", (0, 8)))
    if most > options.get("names", most):
        raise InputError(f"--names {options['names']}: a problem of this depth and redundancy can hold {most} quantities; raise it")
    for name in ("max_answer", "max_value"):
        if options.get(name) is not None and options[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {options[name]}: must be at least 1")


def draw_chunk(job):
    """Draws number start ... start+63 of a seed: (fingerprint, problem) or (None, reason for rejection), in order."""
    task, seed, start, split, options = job
    results = []
    for i in range(start, start + 64):
        problem = TASKS[task].draw(Random(seed << 40 | i), **options)  # a generator of its own: any worker can draw it
        key = None if isinstance(problem, str) else fingerprint(problem.question)
        if key is not None and split and key % 100 not in SPLITS[split]:
            key, problem = None, "another split"
        results.append((key, problem))
    return results


def draw_chunks(jobs, workers):
    """The results of draw_chunk for endless jobs, in order."""
    if workers == 1:
        yield from map(draw_chunk, jobs)
    pool = ProcessPoolExecutor(workers)
    try:
        waiting = deque(pool.submit(draw_chunk, job) for job in islice(jobs, 4 * workers))
        for job in jobs:
            waiting.append(pool.submit(draw_chunk, job))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def generate(task="igsm", ops=(15, 20), seed=0, split="train", workers=1, rejected=None, **options):
    """Endless iterator of distinct problems; same arguments, same problems, whatever `workers`.

    ops: (low, high) operations (igsm); options: what `draw_problem` (igsm) or `draw_promptbench` takes; rejected: a
    Counter that collects why draws were dropped. Raises InputError where nothing can be drawn."""
    if task not in TASKS:
        raise InputError(f"--task {task}: use {' or '.join(TASKS)}")
    if split is not None and split not in SPLITS:
        raise InputError(f"--split {split}: use {', '.join(SPLITS)}")
    options = options | ({"ops": tuple(ops)} if task == "igsm" else {})
    check_options(options)
    jobs = ((task, seed, start, split, options) for start in count(0, 64))
    return keep_distinct(draw_chunks(jobs, workers), Counter() if rejected is None else rejected)


def keep_distinct(chunks, rejected):
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


# --------------------------------------------------------------------------------------------- JSON lines
SETTINGS = {"igsm": ("ops", "categories"), "promptbench": ("depth", "redundancy")}  # the fields that a task adds


def to_record(problem):
    """Problem -> the dict that one JSON line holds."""
    names = ("id", "task", "question", "response", "answer", *SETTINGS[problem.task])
    return {name: getattr(problem, name) for name in names}


def from_record(record, graph=False):
    """A dict -> Problem; graph: also read the question back into its DAG. Raises ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    task = record.get("task", "igsm")
    if task not in list(SETTINGS):
        raise ValueError(f"the field 'task' must be {' or '.join(SETTINGS)}")
    problem = Problem(record.get("question"), record.get("answer"), "", {}, task=task, id=record.get("id"))
    for name in ("response", *SETTINGS[task]):
        setattr(problem, name, record.get(name, getattr(problem, name)))
    for name in ("answer", "ops", "depth", "redundancy"):
        if type(getattr(problem, name)) is not int:
            raise ValueError(f"the field '{name}' must be an integer")
    for name in ("question", "response"):
        if not isinstance(getattr(problem, name), str):
            raise ValueError(f"the field '{name}' must be text")
    layers = problem.categories.values() if isinstance(problem.categories, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in layers):
        raise ValueError("the field 'categories' must hold lists of names")
    if graph:
        read = read_question(problem.question, problem.categories)
        if (read.task, read.answer) != (task, problem.answer):
            raise ValueError(f"the question's answer is {read.answer} ({read.task}), not {problem.answer}")
        problem.target, problem.nodes, problem.categories = read.target, read.nodes, read.categories
    return problem


def read_problems(path, graph=False):
    """All problems of a JSONL file. Raises InputError that names the file and the first bad line."""
    problems = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        problems.append(from_record(json.loads(line), graph))
                    except json.JSONDecodeError as error:
                        raise InputError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}); give one problem a line, "
                                         "as data.py writes them") from None
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{path}, line {number}: {error}") from None
                    if problems[-1].id is None:
                        problems[-1].id = number
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give a JSONL file as data.py writes it") from None
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


# ------------------------------------------------------------------------------------------ showing, command
def draw_picture(problem):
    """The DAG as text, from the target down to what is given, then what the answer does not need (see the top)."""
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
    for name in reversed(formulas):
        if name not in seen:
            lines += ["not needed:"] * ("not needed:" not in lines)
            draw(name, "", "")
    return "\n".join(lines)


# What the embedded tiny model is trained and tested on (README, "The default"); its OOD test takes more operations.
TINY, TINY_OOD = dict(ops=(2, 4), max_value=100), (5, 6)


def add_problem_flags(parser):
    """The flags that say which problems are drawn, shared by the scripts that draw them."""
    add = parser.add_argument
    add("--task", default="igsm", choices=list(TASKS), help="which kind of problem")
    add("--ops", type=int, nargs=2, metavar=("LO", "HI"),
        help=f"igsm: operations a problem; default: {TINY['ops'][0]} {TINY['ops'][1]}, with --max-value {TINY['max_value']}")
    add("--size", type=int, nargs=2, metavar=("LO", "HI"), help="igsm: premises a problem; default: follows the operations")
    add("--depth", type=int, default=4, help="promptbench: levels of the tree")
    add("--redundancy", type=int, nargs=2, default=(0, 8), metavar=("LO", "HI"), help="promptbench: trees that serve nothing")
    add("--names", type=int, default=len(NAMES), help="promptbench: how many names there are to draw from")
    add("--tidy", action="store_true", help="igsm: letters in order of appearance and one wording (a small model's answers)")
    add("--max-answer", type=int, default=1000, help="drop problems with |answer| >= this")
    add("--max-value", type=int, help="drop problems where a value on the way is >= this (a small model's arithmetic)")


def problem_options(args):
    """Those flags, checked, as keyword arguments of `generate`. Without --ops they are those of the tiny default."""
    names = {"igsm": ("ops", "size", "tidy"), "promptbench": ("depth", "redundancy", "names")}[args.task]
    options = {name: getattr(args, name) for name in (*names, "max_answer", "max_value")}
    if args.task == "igsm" and args.ops is None:
        options |= {"ops": TINY["ops"], "max_value": TINY["max_value"] if args.max_value is None else args.max_value}
    check_options(options)
    return {"task": args.task} | options


class Summary:
    """Counts what passes through, so that a data set describes itself."""

    def __init__(self):
        self.start, self.n, self.words, self.redundant, self.implied = time.time(), 0, [0, 0], 0, 0
        self.answers, self.ops, self.rejected = Counter(), Counter(), Counter()

    def watch(self, problems):
        for problem in problems:
            needed = needed_nodes(problem.nodes, problem.target)
            self.n += 1
            self.answers[problem.answer] += 1
            self.ops[problem.ops] += 1
            self.words[0] += len(problem.question.split())
            self.words[1] += len(problem.response.split())
            self.redundant += len(problem.nodes) > len(needed)
            self.implied += any(not problem.nodes[name].text for name in needed)
            yield problem

    def __str__(self):
        seconds, draws = time.time() - self.start, self.n + sum(self.rejected.values())
        answer, times = self.answers.most_common(1)[0]
        duplicates = self.rejected["a duplicate"]
        why = ", ".join(f"{reason} {k / draws:.1%}" for reason, k in self.rejected.most_common() if reason != "a duplicate")
        bins = Counter()
        for value, k in self.answers.items():
            bins[sum(value > edge for edge in (-1, 0, 9, 99))] += k
        shares = [f"{name} {bins[i] / self.n:.1%}" for i, name in enumerate(("below 0", "0", "1-9", "10-99", "100 up"))]
        return (f"{self.n} problems, {self.n / seconds:.0f} a second\n"
                f"of {draws} draws rejected: {why or 'none'}; {duplicates} duplicates dropped\n"
                f"words: question {self.words[0] / self.n:.0f}, answer {self.words[1] / self.n:.0f}\n"
                f"with redundant premises {self.redundant / self.n:.0%}, with an implied quantity {self.implied / self.n:.0%}\n"
                f"answers: {', '.join(shares)}; always answering {answer} would score {times / self.n:.1%}\n"
                "operations: " + ", ".join(f"{ops}: {k}" for ops, k in sorted(self.ops.items())))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_problem_flags(parser)
    parser.add_argument("--n", type=int, default=1, help="how many problems")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same problems")
    parser.add_argument("--split", choices=list(SPLITS), default="train", help="which share of all problems to draw from")
    parser.add_argument("--workers", type=int, default=1, help="processes; the output does not depend on it")
    parser.add_argument("--out", help="JSONL file to write; without it problems are printed")
    args = parser.parse_args()
    if args.n < 1 or args.workers < 1 or not 0 <= args.seed < 2**31:
        raise InputError("--n and --workers must be at least 1, --seed must lie in 0 ... 2^31 - 1")
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


if __name__ == "__main__":
    run_cli(main)
