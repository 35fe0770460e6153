"""Grade a submission: points for each exercise, "yours" beside "expected" where they differ.

    python tests/course/grade.py FOLDER                                        # text
    python tests/course/grade.py FOLDER --format gradescope --json results.json
    python tests/course/grade.py FOLDER --format classroom --json results.json

Only the functions of an exercise, with new helpers that they use, are taken from FOLDER; all else is this
copy's: the chapters that they build on, the checks, the inputs, drawn from --seed. So a gap costs once, and
nothing that a submission holds besides can change a result. Each exercise runs in a process of its own, with
limits of time and memory and, for root, a user of its own; what comes back are values, never a verdict.

In a students' copy the chapters are incomplete: there the expected values lie in expected.json, drawn from
one known seed, and an exercise needs the exercises before it that it builds on.
"""
import argparse, ast, contextlib, functools, hashlib, importlib, json, math, os, pwd, random, re, resource
import secrets, select, signal, sys, tempfile, textwrap, time
from pathlib import Path

from exercises import EXERCISES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CHAPTERS = ("data", "inject", "sample", "sft", "grpo", "eval")
MOST_BYTES = 20_000_000   # of a result, and of any file that a submission writes
USERS = range(60_578, 61_184)  # nobody's by convention: a submission runs as one of them, who owns nothing


# -------------------------------------------------------------- 1. A function out of one file, into another
@functools.lru_cache(64)
def parse(text):
    return ast.parse(text)


def scopes(tree):
    """(name of the class or "", statement) of all that can be an exercise or its helper."""
    for statement in tree.body:
        yield "", statement
        if isinstance(statement, ast.ClassDef):
            yield from ((statement.name, inner) for inner in statement.body)
        elif isinstance(statement, ast.If):
            yield from (("", inner) for inner in statement.body)


def bound(statement):
    """The names that a statement binds."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def find(tree, name):
    """The function "draw" or "Decoder.step" of a file, the last one of that name, or None."""
    owner, _, function = name.rpartition(".")
    functions = [s for scope, s in scopes(tree) if scope == owner and isinstance(s, ast.FunctionDef)]
    return next((s for s in reversed(functions) if s.name == function), None)


def lines_of(text, statement):
    """The source of a statement with its decorators, and its first line's number."""
    first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
    return "\n".join(text.split("\n")[first - 1:statement.end_lineno]), first


def readable(text, names):
    """The file as it is, or where it cannot be parsed, its functions of these names alone: so a slip in one
    function does not take the others with it. Raises SyntaxError where that is in one of them."""
    try:
        parse(text)
        return text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    parts = []
    for name in names:
        owner, _, function = name.rpartition(".")
        block = re.search(rf"^(?:[ ]*@.*\n)*([ ]*)def {function}\(.*\n(?:(?:\1[ ]+.*|[ ]*|\1\).*)\n)*",
                          text + "\n", re.M)
        if block:
            part = textwrap.dedent(block[0])
            parts.append(f"class {owner}:\n{textwrap.indent(part, '    ')}" if owner else part)
    text = "\n".join(parts)
    parse(text)
    return text


def helpers(tree, reference, function, owner):
    """What a function uses that only its own file defines, as (scope, statement), in the file's order."""
    known = {(scope, name) for scope, s in scopes(reference) for name in bound(s)}

    def new(scope, s):  # an import may bring old names beside a new one
        there = [(scope, name) in known for name in bound(s)]
        return not (all(there) if isinstance(s, (ast.Import, ast.ImportFrom)) else any(there))
    there = [(scope, s) for scope, s in scopes(tree)
             if not isinstance(s, (ast.If, ast.Expr)) and scope in ("", owner) and new(scope, s)]
    wanted, waiting = [], [function]
    while waiting:
        nodes = list(ast.walk(waiting.pop()))
        used = {("", node.id) for node in nodes if isinstance(node, ast.Name)}
        used |= {(owner, node.attr) for node in nodes if owner and isinstance(node, ast.Attribute)}
        for scope, s in there:
            if (scope, s) not in wanted and not used.isdisjoint((scope, name) for name in bound(s)):
                wanted.append((scope, s))
                waiting.append(s)
    return [pair for pair in there if pair in wanted]


def paste(reference, submission, names):
    """The reference chapter's text with these functions, and their new helpers, from a submission's text.

    Raises KeyError for a function that the submission lacks, SyntaxError where one cannot be read."""
    submission = readable(submission, names)
    for name in names:
        theirs, tree = find(parse(submission), name), parse(reference)
        if theirs is None:
            raise KeyError(name)
        ours, owner = find(tree, name), name.rpartition(".")[0]
        block, first = lines_of(reference, ours)
        lines, parts = reference.split("\n"), []
        for scope, statement in [*helpers(parse(submission), tree, theirs, owner), (owner, theirs)]:
            part = textwrap.indent(textwrap.dedent(lines_of(submission, statement)[0]), " " * ours.col_offset)
            if scope == owner:
                parts.append(part)
            else:  # a method's helper that stands outside of the class goes to the end of the file
                lines.append(textwrap.dedent(part))
        lines[first - 1:first - 1 + block.count("\n") + 1] = parts
        reference = "\n".join(lines)
    return reference


# ------------------------------------------------------------------------- 2. A check in a process of its own
@functools.cache
def preload():
    """Import what the chapters import, once, and use it: children start with it, and can have it even where
    Python lies in a folder that only root can read."""
    for chapter in CHAPTERS:
        for node in ast.walk(parse(read(ROOT / f"{chapter}.py"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in set(names) - {*CHAPTERS}:
                with contextlib.suppress(ImportError):  # matplotlib and pyarrow are there or not
                    module = importlib.import_module(name)
                    if isinstance(node, ast.ImportFrom):
                        [getattr(module, alias.name) for alias in node.names]
    import torch, transformers
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, num_key_value_heads=1))
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64)).logits.sum().backward()


def plain(value):
    """Tensors, tuples and numbers as JSON has them."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def free_user():
    """For root: the number of a user that is no account's and runs nothing. None for others."""
    if os.geteuid() != 0:
        return None
    accounts, running = {account.pw_uid for account in pwd.getpwall()}, set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            running.add(process.stat().st_uid)
        except FileNotFoundError:  # it has ended
            pass
    return random.choice([user for user in USERS if user not in accounts | running])


def become(user):
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def restrict(user, pipe, seconds, gigabytes):
    """The limits of a child: time, memory, files, processes, and a user who can touch nothing."""
    os.setsid()
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 4096)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what it prints costs it time alone
        os.dup2(null, descriptor)
    limits = {"RLIMIT_CPU": math.ceil(seconds), "RLIMIT_FSIZE": MOST_BYTES, "RLIMIT_CORE": 0}
    if os.path.exists("/proc/self/statm"):  # what it has to begin with, PyTorch above all
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits["RLIMIT_AS"] = pages * resource.getpagesize() + int(gigabytes * 2**30)
    if user:
        limits["RLIMIT_NPROC"] = 64
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if user:
        become(user)


def clean_up(pid, user):
    """End a child and what it left behind: its process group and all that its user runs."""
    for end, target in ((os.kill, pid), (os.killpg, pid)):
        try:
            end(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    if user and (helper := os.fork()) == 0:
        try:
            become(user)
            os.kill(-1, signal.SIGKILL)  # all processes of this user
        finally:
            os._exit(0)
    if user:
        os.waitpid(helper, 0)
    os.waitpid(pid, 0)


def interpret_triton():
    """Triton reads TRITON_INTERPRET as it is imported. This comes before the process becomes another user, who
    may not be able to read the library."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        for name in [name for name in sys.modules if re.match(r"triton(?!\._C)", name)]:
            del sys.modules[name]
        with contextlib.suppress(ImportError):
            import triton.experimental.gluon.language, triton.runtime.interpreter  # what else a launch imports


def child(exercise, folder, seed, pipe):
    """In the new process: import the chapters of `folder`, run the check, send its values."""
    import torch
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    torch.cuda.is_available = lambda: False
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for chapter in CHAPTERS:  # those of a process that had imported its own
            sys.modules.pop(chapter, None)
        sys.path[:0] = [str(folder)]
        os.chdir(folder)
        sys.dont_write_bytecode = True
        chapter = importlib.import_module(exercise.chapter) if exercise.chapter else None
        result = {"values": plain(exercise.check(chapter, seed) if chapter else exercise.check(folder))}
    except BaseException as error:
        names = []
        while error is not None and len(names) < 5:
            names.append(f"{type(error).__name__}: {error}"[:300])
            error = error.__cause__ or error.__context__
        result = {"error": " <- ".join(names)}
    try:
        with os.fdopen(pipe, "w") as file:
            json.dump(result, file, default=repr)
    finally:
        os._exit(0)


def run(exercise, folder, seed, seconds=10, gigabytes=2):
    """{"values": ...} or {"error": ...} of a check over the chapters in `folder`."""
    user, (reader, writer) = free_user(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            parse.cache_clear()  # the reference chapters lie in it
            if "_kernel" in exercise.names[0]:
                interpret_triton()
            restrict(user, writer, seconds, gigabytes)
            child(exercise, folder, seed, writer)
        finally:
            os._exit(1)
    os.close(writer)
    data, end = b"", time.monotonic() + 3 * seconds  # it may have to share a core, and it may sleep
    while len(data) < MOST_BYTES and select.select([reader], [], [], max(0, end - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    clean_up(pid, user)
    os.close(reader)
    try:
        result = json.loads(data)
        return {"error": str(result["error"])} if "error" in result else {"values": result["values"]}
    except (ValueError, RecursionError, TypeError, LookupError):
        return {"error": f"no result: it ran on for {seconds} s, ended early, or needed too much memory"}


# --------------------------------------------------------------------------------------------- 3. The verdict
def largest(value):
    if isinstance(value, (list, dict)):
        return max(map(largest, value.values() if isinstance(value, dict) else value), default=0.0)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return abs(value) if number and math.isfinite(value) else 0.0


def difference(yours, expected, tolerance, where=""):
    """The first place where two results differ by more than `tolerance`, as text, or ""."""
    number = isinstance(expected, float) and isinstance(yours, (int, float)) and not isinstance(yours, bool)
    if number and math.isfinite(expected) and abs(yours - expected) <= tolerance:
        return ""
    if isinstance(expected, (list, dict)) and type(yours) is type(expected) and len(yours) == len(expected):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        if isinstance(expected, list) or set(yours) == set(expected):
            found = (difference(yours[k], expected[k], tolerance, f"{where}[{k}]") for k in keys)
            return next(filter(None, found), "")
    if type(yours) is type(expected) and yours == expected:
        return ""
    return f"{where}: yours {shorten(yours)}, expected {shorten(expected)}"


def shorten(value):
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def judge(result, expected, tolerance):
    """What is wrong with a result, or ""."""
    if "error" in result:
        return result["error"]
    yours, shown = result["values"], True
    if expected is None:  # an experiment's values are (yours, what the logs say), and the latter is asked for
        (yours, expected), shown = yours, False
    if not isinstance(yours, dict) or set(yours) != set(expected):
        return "no result of the form that is expected"
    lines = []
    for label in expected:
        if text := difference(yours[label], expected[label], tolerance * largest(expected[label]), label):
            yours_alone = f"{label}: yours {shorten(yours[label])} is not what the logs say"
            lines.append(text if shown else yours_alone)
    return "\n".join(lines[:3]) + (f"\n... and {len(lines) - 3} more" if len(lines) > 3 else "")


def read(path):
    return path.read_text(encoding="utf-8")


def submitted(submission, path):
    """A file's bytes; nothing where it is no file, too large, or a link that leads to the solutions."""
    inside = path.resolve().is_relative_to(submission.resolve())
    return path.read_bytes() if inside and path.is_file() and path.stat().st_size < MOST_BYTES else b""


def collect(exercise, submission, whole):
    """What one check runs over, {file name: bytes}. submission: a folder, or None for the reference; whole:
    whether all chapters are the submission's. Raises KeyError and SyntaxError as `paste` does."""
    if not exercise.chapter:
        files = (submission / "tests/course/experiments").glob("*")
        return {path.name: content for path in files if (content := submitted(submission, path))}
    names, own = [f"{chapter}.py" for chapter in CHAPTERS], f"{exercise.chapter}.py"
    if whole:
        return {name: submitted(submission, submission / name) for name in names}
    texts = {name: read(ROOT / name) for name in names}
    if submission:
        theirs = submitted(submission, submission / own).decode("utf-8-sig", errors="replace")
        texts[own] = paste(texts[own], theirs.replace("\r\n", "\n"), exercise.names)
        for name in exercise.hides:  # what is asked for must not be called
            texts[own] = paste(texts[own], f"def {name}(): raise NotImplementedError\n", [name])
    return {name: text.encode() for name, text in texts.items()}


def run_in_sandbox(exercise, number, submission, seed, whole, limits, cache):
    """The result of a check, from `cache` where it has run over the same files."""
    try:
        files = collect(exercise, submission, whole)
    except KeyError as missing:
        return {"error": f"{exercise.chapter}.py holds no function {missing.args[0]}"}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"error": f"{exercise.chapter}.py: {type(error).__name__}: {error}"}
    texts = b"".join(hashlib.sha256(part).digest() for name, text in sorted(files.items())
                     for part in (name.encode(), text))
    key = number, seed, texts  # a hash shows no solution
    if key not in cache:
        with tempfile.TemporaryDirectory() as folder:
            os.umask(0o022)
            os.chmod(folder, 0o755)  # another user reads it
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            cache[key] = run(exercise, Path(folder), seed, *limits)
    return cache[key]


class Ungradable(Exception):
    """An exercise that is not there, or whose reference does not run on this machine."""


def reference_values(exercise, number, seed, cache):
    result = run_in_sandbox(exercise, number, None, seed, False, (60, 4), cache)
    if "error" in result:
        raise Ungradable(f"exercise {number}: its reference does not run here ({result['error']}); "
                         "mend that, or leave it out: name all others in --exercises")
    return result["values"]


def grade(submission, seed, limits=(10, 2), chosen=None, cache=None):
    """[(number, exercise, points, what is wrong)] of a folder. cache: a dict that keeps what checks returned,
    for those who grade many copies that differ little."""
    cache, known = {} if cache is None else cache, HERE / "expected.json"
    known = json.loads(known.read_text()) if known.exists() else {}
    seed, chosen = known.get("seed", seed), chosen or known.get("exercises")
    there = set(known.get("exercises", range(1, len(EXERCISES) + 1)))
    if missing := sorted(set(chosen or ()) - there):
        raise Ungradable(f"--exercises {missing[0]}: not in this copy, which holds "
                         + ", ".join(map(str, sorted(there))))
    numbered = [(k, exercise) for k, exercise in enumerate(EXERCISES, 1) if not chosen or k in chosen]
    preload()
    results = [run_in_sandbox(exercise, k, submission, seed, bool(known), limits, cache)
               for k, exercise in numbered]
    rows = []
    for (k, exercise), result in zip(numbered, results):  # no expected value exists while submissions run
        expected = None
        if exercise.chapter:
            expected = known["values"][str(k)] if known else reference_values(exercise, k, seed, cache)
        wrong = judge(result, expected, exercise.tolerance)
        rows.append((k, exercise, 0 if wrong else exercise.points, wrong))
    return rows


# --------------------------------------------------------------------------------------------- 4. The formats
def as_text(rows):
    lines = []
    for k, exercise, points, wrong in rows:
        place = f"{exercise.chapter}.py, {', '.join(exercise.names)}" if exercise.chapter else "experiments"
        lines += [f"{k:2}. {points} of {exercise.points}  {exercise.title} ({place})"]
        lines += [f"      {line}" for line in wrong.split("\n") if line]
    return "\n".join([*lines, f"total: {sum(r[2] for r in rows)} of {sum(r[1].points for r in rows)} points"])


def as_gradescope(rows):
    """gradescope-autograders.readthedocs.io/en/latest/specs: the file results.json."""
    tests = [{"name": exercise.title, "number": str(k), "score": points, "max_score": exercise.points,
              "status": "failed" if wrong else "passed", "output": wrong, "visibility": "visible"}
             for k, exercise, points, wrong in rows]
    return {"output": "Yours beside expected, where they differ.", "output_format": "text",
            "visibility": "visible", "tests": tests}


def as_classroom(rows):
    """What github.com/classroom-resources/autograding-grading-reporter reads, before base64."""
    tests = [{"name": f"{k}. {exercise.title}", "status": "fail" if wrong else "pass", "score": points,
              "message": wrong or None, "test_code": wrong, "filename": "", "line_no": 0, "duration": 0}
             for k, exercise, points, wrong in rows]
    return {"version": 1, "status": "fail" if any(t["status"] == "fail" for t in tests) else "pass",
            "max_score": sum(exercise.points for _, exercise, _, _ in rows), "tests": tests}


FORMATS = {"text": as_text, "gradescope": as_gradescope, "classroom": as_classroom}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a submission: a folder with the six scripts")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--json", type=Path, help="write there, and print the text")
    parser.add_argument("--exercises", type=int, nargs="+", metavar="K", help="these numbers; default: all")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    parser.add_argument("--seconds", type=float, default=10, help="of computing, for each exercise")
    parser.add_argument("--gigabytes", type=float, default=2, help="of memory, for each exercise")
    args = parser.parse_args()
    if not (args.folder / "data.py").is_file():
        parser.exit(2, f"error: {args.folder}: holds no data.py; name a folder with the six scripts\n")
    os.environ["TRITON_INTERPRET"] = "1"
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    try:
        rows = grade(args.folder.resolve(), seed, (args.seconds, args.gigabytes), args.exercises)
    except Ungradable as reason:
        parser.exit(2, f"error: {reason}\n")
    report = FORMATS[args.format](rows)
    text = report if isinstance(report, str) else json.dumps(report, indent=1)
    if args.json:
        args.json.write_text(text if args.format != "text" else json.dumps(as_gradescope(rows), indent=1))
        text = as_text(rows)
    print(text)


if __name__ == "__main__":
    main()
