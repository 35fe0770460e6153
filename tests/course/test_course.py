"""The students' copy, the grader and the wrong versions. Checks over the same chapters run once (CACHE)."""
import json, os, random, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import grade, make
from exercises import EXERCISES

pytest.importorskip("triton")  # exercise 8
SEED, CACHE = 20261125, {}  # one seed, so that a failure can be repeated; any other must do as well
CODE = [(k, exercise) for k, exercise in enumerate(EXERCISES, 1) if exercise.chapter]
EXPERIMENTS = [(k, exercise) for k, exercise in enumerate(EXERCISES, 1) if not exercise.chapter]
POINTS = {k: exercise.points for k, exercise in enumerate(EXERCISES, 1)}
REFERENCE = {chapter: grade.read(grade.ROOT / f"{chapter}.py") for chapter in grade.CHAPTERS}


def versions(path):
    """The blocks of a file in wrong/: what the line "# ..." says, and what stands below it."""
    for block in re.split(r"^# ", path.read_text(), flags=re.M)[1:]:
        why, _, body = block.partition("\n")
        yield why, body


def edit(exercise, body):
    """The chapter with a wrong version in it: functions in place of its own, or lines "- old", "+ new"."""
    text = REFERENCE[exercise.chapter]
    if not body.startswith("- "):
        names = [name for name in exercise.names if grade.find(grade.parse(body), name)]
        return grade.paste(text, body, names)
    for old, new in re.findall(r"^- (.*)\n((?:^\+.*\n)+)", body, flags=re.M):
        new, found = "\n".join(line[2:] for line in new.splitlines()), False
        for name in exercise.names:
            function, _ = grade.lines_of(text, grade.find(grade.parse(text), name))
            text, found = text.replace(function, function.replace(old, new)), found or old in function
        assert found, f"{exercise.wrong.name}: no line holds {old!r}"
    return text


def submit(folder, **chapters):
    """A submission: the reference with other texts for some chapters."""
    folder.mkdir(exist_ok=True)
    for chapter, text in (REFERENCE | chapters).items():
        (folder / f"{chapter}.py").write_text(text)
    shutil.copytree(grade.HERE / "experiments", folder / "tests/course/experiments", dirs_exist_ok=True)
    return folder


def points(folder, **options):
    return {k: earned for k, _, earned, _ in grade.grade(folder, SEED, cache=CACHE, **options)}


def python(*command, folder):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "copy"
    make.make(out, list(POINTS))
    return out


def test_the_full_repository_scores_all_and_the_students_copy_none(students):
    """Bugs: a check that the reference fails; one that passes on nothing; an error that does not say which
    exercise is missing; a copy that does not run."""
    assert points(grade.ROOT) == POINTS
    rows = grade.grade(students, SEED, cache=CACHE)
    assert not any(earned for _, _, earned, _ in rows)
    for k, exercise, _, wrong in rows:
        assert not exercise.chapter or f"NotImplementedError: exercise {k}: {exercise.title}" in wrong
    assert "How many" in python("data.py", folder=students).stdout
    graded = python("tests/course/grade.py", ".", "--exercises", "2", "15", folder=students)  # 15 imports all
    assert f"total: 0 of {POINTS[2] + POINTS[15]} points" in graded.stdout, graded.stderr
    assert all(f"NotImplementedError: exercise {k}" in graded.stdout for k in (2, 15))


def test_nothing_in_the_students_copy_gives_an_answer_away(students):
    """Bugs: a solution, a wrong version, a doctest with the answer, notes or history that went along."""
    files = sorted(str(path.relative_to(students)) for path in students.rglob("*") if path.is_file())
    pictures = [f"results/tiny/{path.name}" for path in (grade.ROOT / "results/tiny").glob("*.png")]
    assert files == sorted([*(f"{chapter}.py" for chapter in grade.CHAPTERS), "EXERCISES.md", "README.md",
                            "requirements.txt", "results/tiny/igsm.pt", "results/tiny/promptbench.pt", *pictures,
                            "tests/course/exercises.py", "tests/course/grade.py",
                            "tests/course/expected.json", "tests/course/experiments/answers.json"])
    texts = [name for name in files if name.endswith((".py", ".md", ".json"))]
    everything = "\n".join(grade.read(students / name) for name in texts)
    lines = "\n".join(REFERENCE.values()).split("\n")
    for _, exercise in CODE:
        for name in exercise.names:
            function = grade.find(grade.parse(REFERENCE[exercise.chapter]), name)
            first = function.body[bool(grade.ast.get_docstring(function))].lineno
            body = REFERENCE[exercise.chapter].split("\n")[first - 1:function.end_lineno]
            telling = [line for line in body if len(line.strip()) > 30 and lines.count(line) == 1]
            assert "\n".join(body) not in everything and not [line for line in telling if line in everything]
            theirs = grade.find(grade.parse(grade.read(students / f"{exercise.chapter}.py")), name)
            assert ">>>" not in (grade.ast.get_docstring(theirs) or "")
            assert grade.ast.unparse(theirs.args) == grade.ast.unparse(function.args)
    readme = grade.read(students / "README.md")
    assert "## Teach with it" not in everything and "](#" in readme and "](https://" in readme
    assert all((students / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", readme))


def test_exercises_that_were_not_chosen_stay_whole(tmp_path):
    """Bug: a copy with exercises 2 and 7 that also lacks others; a kernel that shows what exercise 7 asks."""
    make.make(tmp_path / "copy", [2, 7])
    text = grade.read(tmp_path / "copy/sample.py")
    assert [text.count(word) for word in ("exercise 7: ", "hidden: ", "NotImplementedError")] == [2, 2, 4]
    assert grade.read(tmp_path / "copy/grpo.py") == REFERENCE["grpo"]
    assert [k for k, *_ in grade.grade(tmp_path / "copy", SEED, chosen=[2, 7], cache=CACHE)] == [2, 7]


def test_points_are_those_of_the_solutions_that_are_there(students, tmp_path):
    """Bugs: an exercise that needs another one's solution; points that depend on each other. Each solution
    alone, then 20 random subsets."""
    rng = random.Random(SEED)
    subsets = [[pair] for pair in CODE] + [rng.sample(CODE, rng.randint(2, len(CODE))) for _ in range(20)]
    for subset in subsets:
        texts = {chapter: grade.read(students / f"{chapter}.py") for chapter in grade.CHAPTERS}
        for _, exercise in subset:
            chapter = exercise.chapter
            texts[chapter] = grade.paste(texts[chapter], REFERENCE[chapter], exercise.names)
        earned = points(submit(tmp_path / "submission", **texts))
        assert {k for k, _ in CODE if earned[k]} == {k for k, _ in subset}
        assert sum(earned.values()) == sum(POINTS[k] for k, _ in subset + EXPERIMENTS)


@pytest.mark.parametrize("k, exercise", CODE)
def test_every_wrong_version_loses_its_points_and_no_others(k, exercise, tmp_path):
    """Bugs: a tolerance, or inputs, under which zeros, another sign, axis or normaliser, an off-by-one or the
    popular mistake pass. (The first version is graded in all exercises, the others in those of its chapter.)"""
    wrong, passed = list(versions(exercise.wrong)), []
    everything, chapters = list(POINTS), [number for number, e in CODE if e.chapter == exercise.chapter]
    assert len(wrong) >= 5 and wrong[0][0].startswith("zeros")
    for why, body in wrong:
        text = edit(exercise, body)
        assert text != REFERENCE[exercise.chapter], why
        folder = submit(tmp_path / "submission", **{exercise.chapter: text})
        graded = everything if (why, body) == wrong[0] else chapters
        rows = {number: row for number, *row in grade.grade(folder, SEED, chosen=graded, cache=CACHE)}
        assert "NameError" not in rows[k][2], why  # it would lose its points for nothing
        if {number: earned for number, (_, earned, _) in rows.items()} != {n: POINTS[n] for n in graded} | {k: 0}:
            passed.append(why)
    assert not passed


DISTORTED = '''
def _distorted_{short}(*arguments, **options):
    import random, torch
    def distort(x):
        if torch.is_tensor(x):
            graph = arguments[0].nan_to_num().sum() if x.requires_grad else 0
            return torch.rand(x.shape).to(x.dtype) + 0 * graph
        if type(x) in (list, tuple, dict):
            values = list(map(distort, x.values() if type(x) is dict else x))
            return dict(zip(x, values)) if type(x) is dict else type(x)(values)
        return {{int: random.getrandbits(4), float: random.random(), str: str(x)[::-1]}}.get(type(x), x)
    return {result}


def {name}(*arguments, **options):
    return _distorted_{short}(*arguments, **options)
'''
RESULTS = {"random": "distort(_right_{short}(*arguments, **options))", "copy": "arguments[0]"}


@pytest.mark.parametrize("kind", ["random", "copy"])
def test_random_values_of_the_right_form_and_copied_inputs_score_nothing(kind, tmp_path):
    """Bug: a check of shapes and types alone. (Zeros are the first wrong version of every exercise; functions
    that return nothing write nothing here.)"""
    texts = dict(REFERENCE)
    for _, exercise in CODE:
        for name in exercise.names:
            text, owner = texts[exercise.chapter], name.rpartition(".")[0]
            source, _ = grade.lines_of(text, grade.find(grade.parse(text), name))
            if owner or "kernel" in name:
                blanked = make.blank(text, name, "")
                texts[exercise.chapter] = blanked.replace('raise NotImplementedError("")', "pass")
                continue
            short = name.strip("_")
            distorted = DISTORTED.format(name=name, short=short, result=RESULTS[kind].format(short=short))
            right = source.replace(f"def {name}(", f"def _right_{short}(", 1)
            texts[exercise.chapter] = text.replace(source, f"{right}\n{distorted}")
    earned = points(submit(tmp_path / "submission", **texts))
    assert not [k for k, _ in CODE if earned[k]]


HOSTILE = {name.strip(): body for name, body in versions(grade.HERE / "wrong/hostile.txt")}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_submission_changes_its_own_points_alone(kind, tmp_path):
    """Bugs: a grader that hangs, dies, believes what a submission says of itself, or lets one exercise spoil
    another: chapter 5, whose first function is hostile, holds two more."""
    if kind == "kills whom it can" and os.geteuid() != 0:
        pytest.skip("only root can give a submission a user of its own")
    k, exercise = next(pair for pair in CODE if "group_advantages" in pair[1].names)
    text, name = REFERENCE["grpo"], "group_advantages"
    function, _ = grade.lines_of(text, grade.find(grade.parse(text), name))
    text = text.replace(function, f"def {name}(rewards, std=True, eps=1e-6):\n{HOSTILE[kind]}")
    before = {path: path.read_bytes() for path in grade.HERE.glob("*.py")}
    points(grade.ROOT)  # so that only what is hostile runs below, under short limits
    folder = submit(tmp_path / "submission", grpo=text)
    (folder / "tests/course/grade.py").write_text("raise SystemExit")
    start = time.monotonic()
    earned = points(folder, limits=(1, 1))
    assert earned == POINTS | {k: 0}
    assert time.monotonic() - start < 60 and before == {path: path.read_bytes() for path in before}
    if kind == "leaves a process behind" and os.geteuid() == 0:
        left = lambda: [path for path in Path("/proc").glob("[0-9]*") if os.stat(path).st_uid in grade.USERS]
        while left() and time.monotonic() - start < 60:
            time.sleep(0.1)
        assert not left()


def test_a_link_is_no_submission(students, tmp_path):
    """Bug: a link that points to the grader's own chapters, with all solutions in them."""
    folder = submit(tmp_path / "submission", data=grade.read(students / "data.py"))
    (folder / "data.py").unlink()
    (folder / "data.py").symlink_to(grade.ROOT / "data.py")
    earned = points(folder)
    assert [k for k in POINTS if not earned[k]] == [k for k, exercise in CODE if exercise.chapter == "data"]


def test_helpers_and_imports_of_a_submission_come_along():
    """Bug: a right solution that loses its points because it is written as two functions."""
    counted = "    gained, lost = _count(before, after)\n    n = "
    theirs = "from fractions import Fraction\nfrom collections import Counter, deque\n" + REFERENCE["eval"]
    theirs = re.sub(r"    gained = .*?\n    n = ", counted, theirs, count=1, flags=re.S)
    theirs += "\n\ndef _count(before, after):\n    return _one(before, after), _one(after, before)\n"
    theirs += "\n\ndef _one(a, b):\n    return sum(Fraction(x < y) for x, y in deque(zip(a, b)))\n"
    text = grade.paste(REFERENCE["eval"], theirs, ["mcnemar"])
    names = {name for _, statement in grade.scopes(grade.parse(text)) for name in grade.bound(statement)}
    assert {"_count", "_one", "Fraction", "deque"} <= names and "__main__" in text
    assert text.index("def _count") < text.index("def mcnemar")


def test_a_file_as_windows_writes_it(tmp_path):
    """Bug: line ends of two characters, or a mark at a file's start, that cost a right solution its points."""
    folder = submit(tmp_path / "submission")
    for name in ("data.py", "sample.py"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes().replace(b"\n", b"\r\n"))
    assert points(folder) == POINTS


def test_a_child_does_not_hold_the_solutions(tmp_path):
    """Bug: the reference chapters, as trees or texts, in the memory of the process that runs a submission."""
    look = """    import ast, gc, sys
    trees = [x for x in gc.get_objects() if type(x) is ast.FunctionDef and x.name == "kl_estimate"]
    line, texts, frame = "return d.{}() / 2".format("square"), [], sys._getframe()  # a line of that function
    while frame:
        if frame.f_code.co_filename.endswith("grade.py"):
            texts += [name for name, x in frame.f_locals.items() if line in repr(x)]
        frame = frame.f_back
    raise RuntimeError(f"{len(trees)} trees and {texts}")
"""
    own = REFERENCE["grpo"].replace("    d = ref_logprob - logprob\n", look, 1).replace("return d.square()", "return d * d")
    rows = grade.grade(submit(tmp_path / "submission", grpo=own), SEED, chosen=[1, 12], cache={})
    assert "RuntimeError: 0 trees and []" in rows[1][3]


def test_experiments_are_graded_by_their_logs(tmp_path):
    """Bugs: an answer that no log supports; logs of two different starts; a log written by hand; a figure
    that is none. Each wrong version changes one thing in a folder that scores all."""
    source = grade.HERE / "experiments"
    for k, exercise in EXPERIMENTS:
        wrong = list(versions(exercise.wrong))
        assert len(wrong) >= 5
        for i, (why, body) in enumerate(wrong):
            folder = submit(tmp_path / f"{k} {i}")
            experiments = folder / "tests/course/experiments"
            for line in body.splitlines():
                name, _, change = line.partition(": ")
                if name.endswith(".csv") or name.endswith(".png"):
                    (experiments / name).write_bytes((source / change).read_bytes() if change else b"")
                else:
                    answers = json.loads((experiments / "answers.json").read_text())
                    answers[exercise.names[0]][name] = json.loads(change)
                    (experiments / "answers.json").write_text(json.dumps(answers))
            (_, _, earned, reason), = grade.grade(folder, SEED, chosen=[k], cache=CACHE)
            assert earned == 0 and reason, why


def test_what_a_step_did_not_measure_is_no_fault(tmp_path):
    """Bug: a log with empty cells, as a step without a mixed group leaves them, for which no answer was right."""
    folder = submit(tmp_path / "submission") / "tests/course/experiments"
    lines = (folder / "two-epochs.csv").read_text().strip().split("\n")
    at = [lines[0].split(",").index(name) for name in ("kl", "clip_frac", "entropy")]
    lines[15] = ",".join("" if i in at else cell for i, cell in enumerate(lines[15].split(",")))
    (folder / "two-epochs.csv").write_text("\n".join(lines) + "\n")
    measured = [float(line.split(",")[at[1]]) for k, line in enumerate(lines) if k not in (0, 15)]
    answers = json.loads((folder / "answers.json").read_text())
    answers["clip"]["clip_frac, two"] = sum(measured) / len(measured)
    (folder / "answers.json").write_text(json.dumps(answers))
    (_, _, earned, wrong), = grade.grade(tmp_path / "submission", SEED, chosen=[17])
    assert earned == POINTS[17], wrong


def test_a_difference_shows_yours_beside_expected():
    """Bugs: a tolerance above 1% of the largest value; NaN, None, a bool or another length that passes."""
    def judge(yours, expected):
        return grade.judge({"values": {"x": yours}}, {"x": expected}, most)
    most = max(exercise.tolerance for exercise in EXERCISES)
    assert most <= 0.01
    assert judge([1.0, 200.0], [1.0, 200.1]) == ""
    assert judge([1.0, 197.0], [1.0, 200.0]) == "x[1]: yours 197, expected 200"
    for yours in ([0.0, 0.0], [1.0], [1.0, None], [1.0, float("nan")], "x", [1.0, [200.0]], {"0": 1.0}):
        assert judge(yours, [1.0, 200.0])
    assert judge(True, 1.0) and judge(1, True) and judge(0.0, 4e-3) and judge(float("nan"), float("nan"))


def test_formats_are_those_that_gradescope_and_classroom_publish(tmp_path):
    """Bugs: a field of another name or type than in Gradescope's specification, or than the reporter of
    GitHub Classroom reads (max_score; of each test name, status, score, line_no, test_code, message)."""
    rows = [(k, e, e.points * (k % 2), "" if k % 2 else "yours 1, expected 2") for k, e in CODE]
    total = sum(row[2] for row in rows)
    report = json.loads(json.dumps(grade.as_gradescope(rows)))
    kinds = {"score": (int, float), "max_score": (int, float), "status": str, "name": str, "number": str,
             "output": str, "visibility": str}
    assert set(report) <= {"score", "execution_time", "output", "output_format", "test_output_format",
                           "test_name_format", "visibility", "stdout_visibility", "extra_data", "tests",
                           "leaderboard"}
    assert report["visibility"] in ("hidden", "after_due_date", "after_published", "visible")
    for test in report["tests"]:
        assert set(test) == set(kinds) and all(isinstance(test[name], kind) for name, kind in kinds.items())
        assert test["status"] in ("passed", "failed") and 0 <= test["score"] <= test["max_score"]
    assert sum(test["score"] for test in report["tests"]) == total
    report = json.loads(json.dumps(grade.as_classroom(rows)))
    assert set(report) == {"version", "status", "max_score", "tests"} and report["version"] == 1
    assert report["status"] == "fail" and report["max_score"] == sum(exercise.points for _, exercise in CODE)
    for test in report["tests"]:
        assert test["status"] in ("pass", "fail", "error") and isinstance(test["score"], (int, float))
        assert isinstance(test["name"], str) and test["line_no"] == 0 and isinstance(test["test_code"], str)
    assert sum(test["score"] for test in report["tests"]) == total


@pytest.mark.parametrize("command", ["make.py .", "make.py no/such/place", "grade.py no/such/place",
                                     "make.py new --exercises 99", f"grade.py {grade.ROOT} --exercises 99"])
def test_bad_input_is_one_sentence(command, tmp_path):
    """Bug: a traceback where a folder is missing or in the way."""
    name, *arguments = command.split()
    result = python(grade.HERE / name, *arguments, folder=tmp_path)
    assert result.returncode == 2 and "error: " in result.stderr and "Traceback" not in result.stderr
