"""Chapter 1. Problems: grade-school word problems that are graphs in disguise (iGSM).

    python data.py                                          # one problem, its graph, its answer
    python data.py --ops 15 20 --n 2000 --seed 100 --out train.jsonl

A problem is a directed acyclic graph (DAG). Every *quantity* is a node; an edge runs to it from each
quantity that it is computed from. The question states one premise per line in random order, and the
answer walks the graph from what is given to what is asked:

    The number of each Tall Barn's Tin Crate equals 5 more than each Old Barn's Crate.
    The number of each Old Barn's Tin Crate equals 2.                 (2) Old Barn's Tin Crate   ──┐
    The number of each Old Barn's Wicker Crate equals 4.              (4) Old Barn's Wicker Crate ─┤
    How many Tin Crate does each Tall Barn have?                      (6) Old Barn's Crate, implied ┘
                                                                      (11) Tall Barn's Tin Crate = 5 + 6

"each Old Barn's Crate" is *implied*: no premise states it, it is the sum over Old Barn's crates. The file
follows a problem's life: structure graph → dependency graph → text → answer → reading the text back into
its graph → checking an answer step by step → JSONL. Source: Ye et al. 2024 ("Physics of Language Models
2.1"), as modified by BRIDGE (arXiv 2505.18917): no modulo, large answers dropped, redundant premises.

Where we depart from the released generator:
1. the names are our own, and a name never makes a premise ambiguous (theirs are split at "'s ");
2. the size of the structure follows the number of operations, so 1 operation works as well as 30;
3. a hash of the text decides whether a problem is for training, validation or test, whatever the seed.
"""
import argparse, hashlib, json, os, re, sys, time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count
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


# ------------------------------------------------------------------------------------------ the graph
class Node(NamedTuple):
    """One quantity. `formula` is a tuple of ints, names of parents and the symbols + - * ( )."""
    name: str       # "each Old Barn's Crate"
    formula: tuple  # (5, "*", "(", "each ...", "+", "each ...", ")")
    text: str       # its premise after "equals": "5 times the sum of ..."; "" if the quantity is implied

    @property
    def parents(self):
        return tuple(dict.fromkeys(t for t in self.formula if isinstance(t, str) and t not in "+-*()"))

    @property
    def operations(self):
        """max(1, in-degree - 1), where a constant written in the premise counts as one in-edge."""
        return max(1, sum(t not in ("+", "-", "*", "(", ")") for t in self.formula) - 1)


@dataclass
class Problem:
    question: str                 # premises, one a line, then the question line
    answer: int
    target: str                   # name of the node that is asked for
    nodes: dict                   # name -> Node: described and implied, needed and redundant
    response: str = ""            # <think> ... </think> <answer> ... </answer>
    ops: int = 0                  # operations of the nodes that the answer needs
    categories: dict = field(default_factory=dict)  # category -> items drawn, lowest layer first
    task: str = "igsm"
    id: object = None


def reduce_once(tokens):
    """Carry out one operation: innermost bracket first, then * before + and -, then left to right.

    >>> reduce_once((9, "*", "(", 0, "-", 3, ")"))
    (9, '*', -3)
    """
    end = tokens.index(")") if ")" in tokens else len(tokens)
    start = max((i for i in range(end) if tokens[i] == "("), default=-1) + 1
    inner = tokens[start:end]
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


def needed_nodes(nodes, target):
    """Names of the nodes that `target` depends on, itself included, parents before children."""
    order, state = [], {}
    stack = [target]
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
        body = self.parents[0] if len(self.parents) == 1 else ", ".join(self.parents[:-1]) + f" and {self.parents[-1]}" \
            if self.parents else ""
        if self.kind:
            body = f"the {self.kind} of {body}"
        return " ".join(part for part in (str(self.constant) if self.constant is not None else "", self.link, body) if part)


def draw_rule(rng, parents, constant):
    """A premise over these parents, with a written constant or without."""
    kind = "" if len(parents) < 2 else "sum" if len(parents) > 2 else rng.choice(("sum", "difference"))
    link = rng.choice(("more than", "times")) if constant and parents else ""
    return Rule(rng.randint(0, 9) if constant else None, link, kind, tuple(rng.sample(parents, len(parents))))


def draw_needed(rng, edges, implied, ops):
    """The part of the dependency graph that the answer needs -> (order, {instance: (parents, constant)}) or None.

    In stages: (1) implied quantities with all that they rest on, (2) more instance parameters, (3) an order,
    drawn from the target backwards so that every node serves a later one, (4) in-degrees raised until the
    operations are exactly `ops`. In-degree at most 4."""
    instances = [quantity(*edge) for edge in edges]
    limit = rng.randint((ops + 1) // 2, ops)  # what stages 1 and 2 may spend; stage 4 spends the rest
    needed, spent = {}, 0
    for name in rng.sample(list(implied), rng.randint(0, min(3, len(implied)))):
        extra = [q for q in needed_nodes({**implied, **{i: Node(i, (0,), "") for i in instances}}, name) if q not in needed]
        cost = sum(implied[q].operations if q in implied else 1 for q in extra)
        if spent + cost <= limit:
            needed.update(dict.fromkeys(extra))
            spent += cost
    free = [q for q in instances if q not in needed]
    for q in rng.sample(free, min(len(free), max(limit - spent, 0 if needed else 1))):
        needed[q] = None
        spent += 1

    # (3) Backwards. `users`: implied quantities that rest on q and are not placed yet.
    users = Counter(p for q in needed if q in implied for p in implied[q].parents)
    served, parents, reverse = set(), {q: [] for q in needed if q not in implied}, []
    waiting = list(needed)
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
    order = reverse[::-1]

    # (4) A node with in-degree 1 takes a second edge at no cost; every further one costs an operation.
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
    rest = [q for q in map(lambda e: quantity(*e), edges) if q not in order]
    for q in rng.sample(rest, len(rest)):
        degree = rng.choice((0, 1, 1, 2, 2, 3)) if pool else 0
        chosen = rng.sample(pool, min(degree, len(pool)))
        rules[q] = draw_rule(rng, chosen, not chosen or (len(chosen) < 4 and rng.random() < 0.5))
        pool.append(q)
        known = set(pool)  # an implied quantity may serve once all that it rests on is described
        pool += [a for a, node in implied.items() if a not in known and known.issuperset(node.parents)]
    return rules


def draw_problem(rng, ops=(15, 20), max_answer=1000, max_value=None, size=None):
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
    values = {}  # numbers before words: most rejected draws never become text
    for q in order:
        values[q] = evaluate(rules[q].formula() if q in rules else implied[q].formula, values)
        if max_value and abs(values[q]) >= max_value:
            return "a value too large"
    answer = values[order[-1]]
    if abs(answer) >= max_answer:
        return "answer too large"
    rules.update(draw_redundant(rng, edges, implied, order))
    nodes = {q: Node(q, rule.formula(), rule.text()) for q, rule in rules.items()}
    mentioned = [p for node in nodes.values() for p in node.parents] + order
    for p in mentioned:  # `mentioned` grows: an implied quantity can rest on implied ones
        if p in implied and p not in nodes:
            nodes[p] = implied[p]
            mentioned += implied[p].parents
    problem = Problem("", answer, order[-1], nodes, ops=wanted, categories=categories)
    problem.question = write_question(problem, rng)
    problem.response = write_vanilla(problem, order, rng)
    return problem


# ---------------------------------------------------------------------------------------------- text
PREMISE = "The number of {name} equals {text}."
QUESTION = "How many {item} does each {owner} have?"
OPENINGS = ("- Let {x} be the number of {name}.",
            "- The number of {name} is written {x}.",
            "- Now call the number of {name} {x}.")
RETURN = "- Back to the number of {name}, already named {x}."
LINKS = ("Then", "So")
ANALYSIS = "It equals {text}."
REFLECTION = "But {missing} must be known first, so {x} has to wait."
ANSWER = "</think>\n<answer>\nThe final answer is \\boxed{{{value}}}.\n</answer>"


def write_question(problem, rng):
    lines = [PREMISE.format(name=n.name, text=n.text) for n in problem.nodes.values() if n.text]
    rng.shuffle(lines)
    owner, item = problem.target.removeprefix("each ").split("'s ")
    return "\n".join(lines + [QUESTION.format(item=item, owner=owner)])


class Step(NamedTuple):
    """One line of an answer. A reflection is a step with `missing` parents and no equation."""
    node: str
    letter: str
    head: str               # "- Let x be the number of each Old Barn's Crate."
    link: str = "Then"
    analysis: bool = False  # restate the premise before the equation
    subgoal: bool = False   # one operation per "="
    missing: tuple = ()


def open_step(problem, node, letter, rng):
    """A step on `node` in one of the wordings."""
    return Step(node, letter, rng.choice(OPENINGS).format(x=letter, name=node), rng.choice(LINKS))


def write_vanilla(problem, order, rng):
    """The unaugmented answer: one step for each needed node, in the drawn order."""
    letters = rng.sample(LETTERS, len(order))
    return write_response(problem, [open_step(problem, q, x, rng) for q, x in zip(order, letters)])


def show(tokens):
    """A formula as text: (9, "*", "(", 0, "-", 3, ")") -> "9 * (0 - 3)"."""
    return " ".join(map(str, tokens)).replace("( ", "(").replace(" )", ")")


def write_response(problem, steps):
    """Steps -> the whole assistant turn (`<think>` ... `</answer>`)."""
    letters = {s.node: s.letter for s in steps}
    values, lines = {}, []
    for step in steps:
        node, parts = problem.nodes[step.node], [step.head]
        if step.analysis:
            parts.append(ANALYSIS.format(text=node.text))
        if step.missing:
            names = ", ".join(step.missing[:-1]) + " and " * (len(step.missing) > 1) + step.missing[-1]
            parts.append(REFLECTION.format(missing=names, x=step.letter))
        else:
            numbers = tuple(values.get(t, t) for t in node.formula)
            sides = [step.letter, show(letters.get(t, t) for t in node.formula), show(numbers)]
            while step.subgoal and len(numbers) > 1:
                numbers = reduce_once(numbers)
                sides.append(show(numbers))
            values[step.node] = evaluate(numbers)
            sides.append(str(values[step.node]))
            parts.append(f"{step.link} {' = '.join(dict.fromkeys(sides))}.")
        lines.append(" ".join(parts))
    return "\n".join(["<think>", *lines, ANSWER.format(value=problem.answer)])


# ------------------------------------------------------------------------------- reading a question back
def name_pattern(categories):
    """A regular expression for the quantities that these names can form: "each <item>'s <item or category>"."""
    longest = lambda names: "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    items = [item for names in categories.values() for item in names]
    return rf"each (?:{longest(items)})'s (?:{longest([*items, *categories])})(?![A-Za-z])"


def find_categories(question):
    """The categories of a question in our own names: one world, lowest layer first, as far as it is mentioned."""
    for world in WORLDS:
        found = {c: [i for group in groups for i in group if re.search(rf"\b{i}\b", question)] for c, groups in world.items()}
        found = {c: items for c, items in found.items() if items}
        if len(found) > 1 and re.search(name_pattern(found), question):
            return found
    raise ValueError("line 1: the names are not ours; give the question's categories as well")


def read_rule(text, pattern):
    """The text after "equals" -> Rule, or None where it breaks the premise grammar."""
    match = re.match(r"(?:(\d+)(?: (more than|times) )?)?(?:the (sum|difference) of )?", text)
    parents = tuple(re.findall(pattern, text))
    rule = Rule(int(match[1]) if match[1] else None, match[2] or "", match[3] or "", parents)
    counts = {"": parents[1:] == (), "difference": len(parents) == 2, "sum": len(parents) >= 2}[rule.kind]
    return rule if counts and rule.text() == text else None


def read_question(question, categories=None):
    """The problem's DAG from its text alone (Algorithm 1, line 1): a Problem without `response`.

    categories: {category: [items]}, lowest layer first; None: found among our own names. Raises ValueError
    naming the line where the text breaks the grammar, contradicts itself, or leaves a quantity undefined."""
    categories = categories or find_categories(question)
    pattern = name_pattern(categories)
    *premises, asked = question.strip("\n").split("\n")
    nodes = {}
    for number, line in enumerate(premises, 1):
        match = re.fullmatch(rf"The number of ({pattern}) equals (.+)\.", line)
        rule = match and read_rule(match[2], pattern)
        if not rule:
            raise ValueError(f"line {number}: not a premise over the problem's names: '{line[:200]}'")
        if match[1] in nodes:
            raise ValueError(f"line {number}: '{match[1]}' is defined twice")
        nodes[match[1]] = Node(match[1], rule.formula(), match[2])
    last = f"line {len(premises) + 1}"
    match = re.fullmatch(r"How many (.+) does each (.+) have\?", asked)
    if not match or not re.fullmatch(pattern, quantity(match[2], match[1])):
        raise ValueError(f"{last}: the question asks for something that the problem's names do not form: '{asked[:200]}'")
    target = quantity(match[2], match[1])
    edges = [tuple(name.removeprefix("each ").split("'s ", 1)) for name in nodes]
    if any(owner not in itemlist for owner, _ in edges for itemlist in [sum(categories.values(), [])]):
        items = sum(categories.values(), [])  # a name with an apostrophe of its own: split where both halves are names
        edges = [next((o, name[len(f"each {o}'s "):]) for o in items
                      if name.startswith(f"each {o}'s ") and name[len(f"each {o}'s "):] in items) for name in nodes]
    implied = implied_nodes(categories, edges)
    mentioned = [p for node in nodes.values() for p in node.parents] + [target]
    for name in mentioned:
        if name in nodes:
            continue
        if name not in implied:
            where = next((i for i, line in enumerate(premises + [asked], 1) if name in line), len(premises) + 1)
            raise ValueError(f"line {where}: '{name}' is neither described nor implied")
        nodes[name] = implied[name]
        mentioned += implied[name].parents
    try:
        for name in nodes:
            needed_nodes(nodes, name)
        order = needed_nodes(nodes, target)
    except ValueError as error:
        raise ValueError(f"{last}: the premises run in a circle: {error}") from None
    return Problem(question, solve(nodes, target)[target], target, nodes, categories=categories,
                   ops=sum(nodes[q].operations for q in order))


def solve(nodes, target):
    """The values of all nodes that `target` needs: {name: int}."""
    values = {}
    for name in needed_nodes(nodes, target):
        values[name] = evaluate(nodes[name].formula, values)
    return values


# ------------------------------------------------------------------------------------ checking an answer
class Line(NamedTuple):
    """A step line taken apart: which node, which letter, what it restates, its equation, what it misses."""
    node: str
    letter: str
    head: str
    link: str
    analysis: str    # the restated premise or ""
    equation: str    # "x = 5 + y = 5 + 3 = 8" or ""
    missing: tuple   # quantities that a reflection names


def read_line(text, pattern):
    """One line starting with "- " -> Line, or None. Works for our wording and for the released generator's."""
    names = []

    def mask(match):  # quantities leave the text first: names may hold letters, dots and spaces
        names.append(match[0])
        return f"<{len(names) - 1}>"
    unmask = lambda s: re.sub(r"<(\d+)>", lambda m: names[int(m[1])], s)
    masked = re.sub(pattern, mask, text)
    if not names or "<0>" not in masked or re.search(r"<\d+>", text):
        return None
    sentences = re.split(r"(?<=\.) ", masked)
    head, link, analysis, equation, missing = [], "", "", "", ()
    for i, sentence in enumerate(sentences):
        match = re.fullmatch(r"(?:(.*?) )?([A-Za-z] = [^=].*)\.", sentence)
        if i and match and i == len(sentences) - 1:
            link, equation = match[1] or "", match[2]
        elif i and (match := re.fullmatch(r".*\b[Ii]t equals (.+)\.", sentence)):
            analysis = unmask(match[1])
        elif i and "<" in sentence:
            missing = tuple(names[int(k)] for k in re.findall(r"<(\d+)>", sentence))
        else:
            head.append(sentence)
    letters = re.findall(r"(?<![\w'<])([A-Za-z])(?![\w'>])", " ".join(head))
    letter = equation[:1] or (letters[0] if letters else "")
    if not letter or (letters and letters[0] != letter) or bool(equation) == bool(missing):
        return None
    return Line(names[0], letter, unmask(" ".join(head)), link, analysis, equation, missing)


def read_steps(problem, response):
    """The steps of an answer, ready to be edited and handed to `write_response`. Raises ValueError with the line."""
    pattern, steps = name_pattern(problem.categories), []
    for number, text in enumerate(response.split("\n"), 1):
        if text.startswith("- "):
            line = read_line(text, pattern)
            if line is None or line.node not in problem.nodes:
                raise ValueError(f"line {number}: not a step: '{text[:200]}'")
            formula = problem.nodes[line.node].formula
            steps.append(Step(line.node, line.letter, line.head, line.link, bool(line.analysis),
                              line.equation.count(" = ") > 2 + (len(formula) > 1), line.missing))
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
    subgoals: int = 0   # steps whose equation carries out one operation per "=", two operations at least
    redundant: int = 0  # steps that the answer does not need

    @property
    def ok(self):
        return self.error is None


def read_side(text):
    """One side of an equation as tokens ("9 * (0 - 3)" -> (9, "*", "(", 0, "-", 3, ")")), or None if malformed."""
    spaced = text.replace("(", "( ").replace(")", " )").split(" ")
    tokens = tuple(int(t) if re.fullmatch(r"-?[0-9]{1,12}", t) else t for t in spaced)
    depth, operand = 0, True  # operand: an operand (or an opening bracket) must come next
    for t in tokens:
        if t in ("+", "-", "*", ")"):
            depth -= t == ")"
            if operand or depth < 0:
                return None
            operand = t != ")"
        elif not operand or not (t == "(" or isinstance(t, int) or (len(t) == 1 and t in LETTERS)):
            return None
        else:
            depth += t == "("
            operand = t == "("
    return tokens if not depth and not operand else None


def same_function(a, b, rng=Random(0)):
    """Whether two formulas agree as functions of their names (at two random points: chance of error < 1e-15)."""
    names = {t for t in a + b if isinstance(t, str) and t not in "+-*()"}
    points = [{name: rng.getrandbits(60) for name in names} for _ in range(2)]
    return all(evaluate(a, point) == evaluate(b, point) for point in points)


def check_trace(problem, response, subgoal=False):
    """Walk an answer step by step -> Report with the first fault or the counts.

    Every "=" is true; letters are new, known and consistent; a node comes after its parents; a reflection stands
    on a locked node and names parents that are unsolved, all of them and only those; an analysis restates that
    node's own premise; with `subgoal`, each "=" carries out one operation; the target is the last step; the
    boxed answer is right."""
    report, pattern = Report(), name_pattern(problem.categories)
    needed = set(needed_nodes(problem.nodes, problem.target))
    letters, values, last = {}, {}, None

    def fault(kind, reason):
        report.error = Fault(number, kind, reason)
        return report

    for number, text in enumerate(response.split("\n"), 1):
        if not text.startswith("- "):
            continue
        line = read_line(text, pattern)
        if line is None:
            return fault("format", "the line is not a step")
        if line.node not in problem.nodes:
            return fault("retrieval", f"the problem does not define '{line.node}'")
        node = problem.nodes[line.node]
        if letters.get(node.name, line.letter) != line.letter:
            return fault("format", f"'{node.name}' was called {letters[node.name]} before")
        if line.letter in letters.values() and node.name not in letters:
            return fault("format", f"the letter {line.letter} is taken")
        letters[node.name] = line.letter
        if line.analysis and line.analysis != node.text:
            return fault("retrieval", f"this is not the premise of '{node.name}'")
        report.analyses += bool(line.analysis)
        locked = [p for p in node.parents if p not in values]
        if line.missing:
            if not locked:
                return fault("order", f"a reflection on '{node.name}', which can be solved")
            if set(line.missing) != set(locked):
                return fault("order", f"the reflection names other quantities than the unsolved parents of '{node.name}'")
            report.reflections += 1
            continue
        if node.name in values:
            return fault("order", f"'{node.name}' is solved already")
        if locked:
            return fault("order", f"'{node.name}' comes before '{locked[0]}', which it needs")
        sides = [read_side(side) for side in line.equation.split(" = ")]
        if None in sides or len(sides) < 2 or not isinstance(sides[-1][0], int) or len(sides[-1]) > 1:
            return fault("format", "the equation cannot be read")
        solved = {letters[q]: q for q in values}
        formula = tuple(solved.get(t, t) for t in sides[1])
        used = [t for t in formula if isinstance(t, str) and t not in "+-*()"]
        unknown = [t for t in used if t not in values]
        if unknown:
            return fault("format", f"the letter {unknown[0]} has no value")
        if set(used) != set(node.parents) or not same_function(formula, node.formula):
            return fault("retrieval", f"{show(sides[1])} is not what the problem says of '{node.name}'")
        numbers = sides[2:] if used else sides[1:]
        if any(isinstance(t, str) and t in LETTERS for side in numbers for t in side) or not numbers:
            return fault("format", "letters and numbers are mixed")
        if len(numbers) > 1 and numbers[0] != tuple(values.get(t, t) for t in formula):
            return fault("retrieval", "the numbers are not the values of the letters")
        truth = evaluate(node.formula, values)
        for side in numbers:
            if evaluate(side) != truth:
                return fault("arithmetic", f"{show(side)} is not {truth}")
        operations = [sum(t in ("+", "-", "*") for t in side) for side in numbers]
        single = all(a - b == 1 for a, b in zip(operations, operations[1:]))
        if subgoal and (not single or operations[-1] or operations[0] != sum(t in ("+", "-", "*") for t in formula)):
            return fault("arithmetic", "more than one operation in an equality")
        report.subgoals += single and len(operations) > 2
        report.steps += 1
        report.redundant += node.name not in needed
        values[node.name] = truth
        last = node.name
    if last != problem.target:
        return fault("order", "the last step is not the quantity that is asked for")
    if read_answer(response) is None:
        return fault("format", "no single boxed integer inside <answer> after </think>")
    if read_answer(response) != problem.answer:
        return fault("answer", f"the boxed answer is not {problem.answer}")
    return report


BOXED = re.compile(r"\\boxed\{(-?[0-9]{1,18})\}")


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


# ------------------------------------------------------------------------------------------- many problems
SPLITS = {"train": range(0, 60), "val": range(60, 80), "test": range(80, 100)}


def fingerprint(question):
    """64 bits of the sorted premises and the question line: the same problem in any order of premises."""
    *premises, asked = question.split("\n")
    text = "\n".join(sorted(premises) + [asked])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(question):
    return next(name for name, share in SPLITS.items() if fingerprint(question) % 100 in share)


def draw_chunk(job):
    """Draws number start ... start+63 of a seed: problems and reasons for rejection, in order."""
    seed, start, split, options = job
    results = []
    for i in range(start, start + 64):
        problem = draw_problem(Random(seed << 40 | i), **options)  # each draw has its own generator: any worker can make it
        if isinstance(problem, Problem) and split and fingerprint(problem.question) % 100 not in SPLITS[split]:
            problem = "another split"
        results.append(problem)
    return results


def generate(task="igsm", ops=(15, 20), seed=0, split="train", workers=1, rejected=None, **options):
    """Endless iterator of distinct problems; same arguments, same problems, whatever `workers`.

    ops: (low, high) operations; options: max_answer, max_value, size (see `draw_problem`); rejected: a Counter
    that collects why draws were dropped. Raises InputError where nothing can be drawn."""
    if task != "igsm":
        raise InputError(f"task '{task}' is unknown: use igsm")
    if not 1 <= ops[0] <= ops[1] <= 30:
        raise InputError(f"--ops {ops[0]} {ops[1]}: give a low and a high number of operations with 1 <= low <= high <= 30")
    if split is not None and split not in SPLITS:
        raise InputError(f"--split {split}: use {', '.join(SPLITS)}")
    jobs = ((seed, start, split, dict(ops=tuple(ops), **options)) for start in count(0, 64))
    seen, dry = set(), 0
    rejected = Counter() if rejected is None else rejected
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            window = [pool.submit(draw_chunk, next(jobs)) for _ in range(4 * workers)]
            results = (window.pop(0).result() for _ in count() if window.append(pool.submit(draw_chunk, next(jobs))) is None)
            yield from keep_distinct(results, seen, rejected)
    else:
        yield from keep_distinct(map(draw_chunk, jobs), seen, rejected)


def keep_distinct(chunks, seen, rejected):
    dry = 0  # draws since the last problem
    for chunk in chunks:
        for problem in chunk:
            dry += 1
            if isinstance(problem, str):
                rejected[problem] += 1
            elif (key := fingerprint(problem.question)) in seen:
                rejected["a duplicate"] += 1
            else:
                seen.add(key)
                dry = 0
                yield problem
        if dry > 50_000:
            raise InputError(f"no new problem in {dry:,} draws (mostly: {rejected.most_common(1)[0][0]}): "
                             "ask for fewer problems, more operations or a larger bound")


# --------------------------------------------------------------------------------------------- JSON lines
def to_record(problem):
    """Problem -> the dict that one JSON line holds."""
    return {"id": problem.id, "task": problem.task, "question": problem.question, "response": problem.response,
            "answer": problem.answer, "ops": problem.ops, "categories": problem.categories}


def from_record(record, graph=False):
    """A dict -> Problem; graph: also read the question back into its DAG. Raises ValueError with the reason."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key, kind in (("question", str), ("answer", int)):
        if not isinstance(record.get(key), kind) or isinstance(record.get(key), bool):
            raise ValueError(f"the field '{key}' must be {'text' if kind is str else 'an integer'}")
    categories = record.get("categories") or {}
    if not isinstance(record.get("response", ""), str) or not isinstance(categories, dict):
        raise ValueError("'response' must be text and 'categories' an object of lists")
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in categories.values()):
        raise ValueError("'categories' must hold lists of names")
    problem = Problem(record["question"], record["answer"], "", {}, record.get("response", ""), record.get("ops", 0),
                      categories, record.get("task", "igsm"), record.get("id"))
    if graph:
        read = read_question(problem.question, problem.categories)
        if read.answer != problem.answer:
            raise ValueError(f"the question's answer is {read.answer}, not {problem.answer}")
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
    written, partial = 0, f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            for written, record in enumerate(records, 1):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return written


def draw_picture(problem):
    """The DAG as text: a line a node, parents before children; * marks what the answer needs.

    >>> farm = "\\n".join([
    ...     "The number of each Tall Barn's Tin Crate equals 5 more than each Old Barn's Crate.",
    ...     "The number of each Old Barn's Tin Crate equals 2.",
    ...     "The number of each Tall Barn's Pine Crate equals 3 times each Old Barn's Tin Crate.",
    ...     "The number of each Old Barn's Pine Crate equals 4.",
    ...     "How many Tin Crate does each Tall Barn have?"])
    >>> print(draw_picture(read_question(farm)))
    * each Old Barn's Tin Crate    = 2
    * each Old Barn's Pine Crate   = 4
    * each Old Barn's Crate        = each Old Barn's Tin Crate + each Old Barn's Pine Crate = 6  (implied)
    * each Tall Barn's Tin Crate   = 5 + each Old Barn's Crate = 11
      each Tall Barn's Pine Crate  = 3 * each Old Barn's Tin Crate = 6
    """
    needed, order = set(needed_nodes(problem.nodes, problem.target)), needed_nodes(problem.nodes, problem.target)
    for name in problem.nodes:
        order += [q for q in needed_nodes(problem.nodes, name) if q not in order]
    width, values, lines = max(map(len, order)) + 1, {}, []
    for name in order:
        node = problem.nodes[name]
        values[name] = evaluate(node.formula, values)
        value = f" = {values[name]}" if node.parents else ""
        lines.append(f"{'*' if name in needed else ' '} {name:{width}} = {show(node.formula)}{value}"
                     f"{'' if node.text else '  (implied)'}")
    return "\n".join(lines)


# What the embedded tiny model is trained and tested on (README, "The default"); its OOD test takes more operations.
TINY, TINY_OOD = dict(ops=(4, 6), max_value=100), (7, 9)


def add_problem_flags(parser):
    """The flags that say which problems are drawn, shared by the scripts that draw them."""
    parser.add_argument("--task", default="igsm", choices=["igsm"], help="which kind of problem")
    parser.add_argument("--ops", type=int, nargs=2, metavar=("LO", "HI"),
                        help=f"operations a problem; default: {TINY['ops'][0]} {TINY['ops'][1]}, with --max-value {TINY['max_value']}")
    parser.add_argument("--max-answer", type=int, default=1000, help="drop problems with |answer| >= this")
    parser.add_argument("--max-value", type=int, help="drop problems where a value on the way is >= this (a small model's arithmetic)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("LO", "HI"), help="premises a problem; default: follows the operations")


def problem_options(args):
    """Those flags, checked, as keyword arguments of `generate`. Without --ops they are those of the tiny default."""
    ops, max_value = args.ops or TINY["ops"], args.max_value
    if args.ops is None and max_value is None:
        max_value = TINY["max_value"]
    if not 1 <= ops[0] <= ops[1] <= 30:
        raise InputError(f"--ops {ops[0]} {ops[1]}: give a low and a high number with 1 <= low <= high <= 30")
    if args.size and not 2 <= args.size[0] <= args.size[1] <= 30:
        raise InputError(f"--size {args.size[0]} {args.size[1]}: give a low and a high number with 2 <= low <= high <= 30")
    for flag in ("max_answer", "max_value"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1")
    return dict(task=args.task, ops=tuple(ops), max_answer=args.max_answer, max_value=max_value,
                size=tuple(args.size) if args.size else None)


class Summary:
    """Counts what passes through, so that a data set describes itself."""

    def __init__(self):
        self.start, self.answers, self.ops, self.words, self.n = time.time(), Counter(), Counter(), [0, 0], 0
        self.rejected, self.redundant, self.implied = Counter(), 0, 0

    def watch(self, problems):
        for problem in problems:
            needed = needed_nodes(problem.nodes, problem.target)
            self.n += 1
            self.answers[problem.answer] += 1
            self.ops[problem.ops] += 1
            self.words[0] += len(problem.question.split())
            self.words[1] += len(problem.response.split())
            self.redundant += any(node.text and name not in needed for name, node in problem.nodes.items())
            self.implied += any(not problem.nodes[name].text for name in needed)
            yield problem

    def __str__(self):
        seconds, draws = time.time() - self.start, self.n + sum(self.rejected.values())
        answer, times = self.answers.most_common(1)[0]
        why = ", ".join(f"{reason} {k / draws:.1%}" for reason, k in self.rejected.most_common()) or "none"
        return (f"{self.n} problems, {self.n / seconds:.0f} a second; rejected of {draws} draws: {why}\n"
                f"words: question {self.words[0] / self.n:.0f}, answer {self.words[1] / self.n:.0f}; "
                f"with a redundant premise {self.redundant / self.n:.0%}, with an implied quantity {self.implied / self.n:.0%}\n"
                f"answers: {len(self.answers)} different; 0 in {self.answers[0] / self.n:.1%}; always answering {answer} "
                f"would score {times / self.n:.1%}\n"
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
    stream = generate(seed=args.seed, split=args.split, workers=args.workers, rejected=summary.rejected, **problem_options(args))
    problems = summary.watch(problem for _, problem in zip(range(args.n), stream))
    if args.out:
        write_records(args.out, (to_record(problem) | {"id": i} for i, problem in enumerate(problems)))
        print(summary)
    else:
        for problem in problems:
            print(f"{problem.question}\n\n{draw_picture(problem)}\n\n{problem.response}\n")


if __name__ == "__main__":
    run_cli(main)
