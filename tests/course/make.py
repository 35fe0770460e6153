"""Make the students' copy: the chapters with the bodies of the exercises taken out.

    python tests/course/make.py OUT                          # all exercises
    python tests/course/make.py OUT --exercises 1 4 7

OUT gets the six scripts, README without its page for teachers (a link to what is not in the copy becomes
text), the two tasks' base models, EXERCISES.md, and
grade.py with the values that are expected for one seed, so that students can check themselves. Not in it:
solutions, wrong versions, tests, notes, history.
"""
import argparse, json, re, shutil, textwrap
from pathlib import Path

import grade
from exercises import EXERCISES


def signature_and_docstring(text, function):
    """Those lines of a function, its doctests left out: they print what is asked for."""
    lines, (first, *_) = text.split("\n"), function.body
    start = grade.lines_of(text, function)[1] - 1
    documented = isinstance(first, grade.ast.Expr) and isinstance(first.value, grade.ast.Constant)
    kept = lines[start:first.end_lineno if documented else first.lineno - 1]
    while kept[-1].lstrip().startswith("#"):  # a comment on the first statement
        kept.pop()
    if not documented or not any(line.lstrip().startswith(">>>") for line in kept):
        return kept
    at = next(i for i, line in enumerate(kept) if line.lstrip().startswith(">>>"))
    while not kept[at - 1].strip():
        at -= 1
    return [*kept[:at], " " * first.col_offset + '"""']


def blank(text, name, message):
    """The chapter's text with the body of a function replaced by an error."""
    function = grade.find(grade.parse(text), name)
    lines, start = text.split("\n"), grade.lines_of(text, function)[1] - 1
    indent = " " * function.body[0].col_offset
    lines[start:function.end_lineno] = [*signature_and_docstring(text, function),
                                        f"{indent}raise NotImplementedError({json.dumps(message)})"]
    return "\n".join(lines)


def describe(number, exercise):
    """An exercise as students read it."""
    where = f"`tests/course/experiments/`: the logs, `{exercise.names[0]}.png` and `answers.json`"
    if exercise.chapter:
        where = f"`{exercise.chapter}.py`: {', '.join(f'`{name}`' for name in exercise.names)}"
    worth = f"{exercise.points} points, about {exercise.hours:g} h"
    parts = [f"## {number}. {exercise.title}", f"{where}. {worth}. Read: {exercise.read}.",
             *exercise.formula.split("\n\n"), f"*Hint.* {exercise.hint}"]
    fill = textwrap.TextWrapper(110, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(part if part.startswith("    ") else fill(part) for part in parts) + "\n"


INTRODUCTION = """# Exercises

Work in this order; each function says in its docstring what it takes and returns, and raises
NotImplementedError until you write it. Check yourself:

    python tests/course/grade.py .

One exercise: `--exercises 11`. (On Windows use WSL.) The grader shows neither prints nor line numbers: try a
function in `python` first. Each exercise has 10 seconds and 2 GB.

Your instructor grades with other inputs, and each exercise with right versions of all others. Only the
functions named here count, with new helpers and imports in the same file. Leave arguments as they are unless
a docstring says otherwise. Hand in a zip of what this folder holds.

An experiment needs all exercises before it, or your instructor's chapters, and `pip install matplotlib`.
Copy grpo.py's .csv files into `tests/course/experiments/` under the names given, draw the figure (`python
eval.py --curves a.csv b.csv --plot FILE.png`) and fill in `answers.json`: means over all steps that have a
value where nothing else is said, a ratio is one mean over the other, shares and not percent, six digits, the
two first rewards as a list [a, b], "higher" as "std" or "no-std", "one" or "two"; and `why`, in 15 words or
more.

"""


def make(out, chosen):
    """Write the students' copy into a new folder; chosen: numbers of exercises."""
    numbered = [(k, EXERCISES[k - 1]) for k in chosen]
    grade.preload()
    values = {str(k): grade.reference_values(exercise, k, 0, {})
              for k, exercise in numbered if exercise.chapter}  # before the folder is begun: it may fail
    course = out / "tests/course"
    (course / "experiments").mkdir(parents=True)
    (out / "results/tiny").mkdir(parents=True)
    names = {(exercise.chapter, name) for _, exercise in numbered for name in exercise.names}
    for chapter in grade.CHAPTERS:
        text = grade.read(grade.ROOT / f"{chapter}.py")
        for k, exercise in numbered:
            for name in exercise.names * (exercise.chapter == chapter):
                text = blank(text, name, f"exercise {k}: {exercise.title}")
            for name in exercise.hides * (exercise.chapter == chapter):
                if (chapter, name) not in names:
                    text = blank(text, name, f"hidden: it would show exercise {k}")
        (out / f"{chapter}.py").write_text(text)
    (out / "EXERCISES.md").write_text(INTRODUCTION + "\n".join(describe(*pair) for pair in numbered))
    pictures = [f"results/tiny/{path.name}" for path in (grade.ROOT / "results/tiny").glob("*.png")]
    for name in ("requirements.txt", "results/tiny/igsm.pt", "results/tiny/promptbench.pt",
                 "tests/course/exercises.py", "tests/course/grade.py", *pictures):
        shutil.copy(grade.ROOT / name, out / name)
    readme = re.sub(r"^## Teach with it\n.*?(?=^## )", "", grade.read(grade.ROOT / "README.md"), flags=re.M | re.S)
    gone = lambda link: link[0] if re.match("#|https?:", link[2]) or (out / link[2]).exists() else link[1]
    (out / "README.md").write_text(re.sub(r"\[([^]]+)\]\(([^)]+)\)", gone, readme))
    questions = {exercise.names[0]: dict.fromkeys(exercise.questions) | {"why": ""}
                 for _, exercise in numbered if not exercise.chapter}
    (course / "experiments/answers.json").write_text(json.dumps(questions, indent=1))
    (course / "expected.json").write_text(json.dumps({"seed": 0, "exercises": chosen, "values": values}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    numbers = range(1, len(EXERCISES) + 1)
    parser.add_argument("--exercises", type=int, nargs="+", choices=numbers, default=list(numbers),
                        metavar="K", help=f"numbers from 1 to {len(EXERCISES)}; default: all")
    args = parser.parse_args()
    if args.out.exists():
        parser.exit(2, f"error: {args.out}: exists already; name a new folder\n")
    if not args.out.resolve().parent.is_dir():
        parser.exit(2, f"error: {args.out}: its folder does not exist\n")
    chosen = sorted(set(args.exercises))
    try:
        make(args.out, chosen)
    except grade.Ungradable as reason:
        parser.exit(2, f"error: {reason}\n")
    points, hours = (sum(getattr(EXERCISES[k - 1], name) for k in chosen) for name in ("points", "hours"))
    print(f"{args.out}: {len(chosen)} exercises, {points} points, about {hours:g} hours; "
          "students start with EXERCISES.md")


if __name__ == "__main__":
    main()
