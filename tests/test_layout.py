"""Which module may import which, so that a reader of train.py can skip runtime/."""

from runtime.start import ROOT

import ast
from collections import defaultdict
from graphlib import TopologicalSorter

FOLDERS = ("runtime", "worlds", "viz", "bench", "research", "tools")
SCRIPTS = {"prepare_annotations", "preprocess_ssv2", "train", "probe", "evaluate", "infer"}
SCRIPTS |= {"retrieve"}
MODULES = {path.stem for path in ROOT.glob("*.py")} - SCRIPTS
OPTIONAL = {"PIL", "matplotlib", "gradio", "sklearn", "torch.utils.tensorboard", "mujoco", "gguf"}
DECODERS = {"av", "decord"}
NESTED = {
    ("runtime.files", "fcntl"): "not available on Windows",
    ("tools.doctor", "tools"): "it imports packages that may be missing",
}


def sources():
    """Return {module: its syntax tree} of everything but tests."""
    paths = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {names[p]: ast.parse(p.read_text()) for p in paths if p.name != "__init__.py"}


def imported(node):
    """Return the modules that a statement imports: `from runtime import cli` imports runtime.cli."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert not node.level, "a relative import"  # the rules below would not see it
    if node.module in FOLDERS:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module]


def imports(tree):
    """Return [(name, inside a function)] for the imports of a module."""
    found = []

    def walk(node, nested):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.extend((name, nested) for name in imported(child))
            walk(child, nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    walk(tree, False)
    return found


def project_imports():
    """Return {module: the modules of this project that it imports}."""
    trees, graph = sources(), defaultdict(set)
    for name, tree in trees.items():
        graph[name] = {other for other, _ in imports(tree) if other in trees}
    return graph


def allowed(name, other):
    """Return True if `name` may import `other`."""
    folder, target = name.partition(".")[0], other.partition(".")[0]
    if target == "runtime" or folder in ("bench", "research"):
        return True
    if folder == target or folder == "runtime":
        return folder == target
    if target in FOLDERS:
        return (name, other) == ("train", "viz.curves")
    if folder in MODULES or folder == "worlds":
        return target in MODULES
    if folder in ("viz", *SCRIPTS):
        return target in MODULES or (target == "evaluate" and folder in ("viz", "train"))
    return folder == "tools"


def test_each_folder_imports_only_what_is_allowed():
    graph = project_imports()
    wrong = [(name, o) for name, others in graph.items() for o in others if not allowed(name, o)]
    assert not wrong


def test_the_product_does_not_import_its_tests():
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    for name, tree in sources().items():
        assert not tests & {other.partition(".")[0] for other, _ in imports(tree)}, name


def test_there_are_no_circular_imports():
    """Imports inside functions hid three of them."""
    TopologicalSorter(project_imports()).prepare()  # raises CycleError


def test_imports_are_at_the_top_of_a_file():
    """Otherwise the import graph would be incomplete. Optional extras and decoders are exceptions."""
    for name, tree in sources().items():
        for other, nested in imports(tree):
            root = other.partition(".")[0]
            known = root in OPTIONAL | DECODERS or other in OPTIONAL or (name, root) in NESTED
            assert not nested or known, f"{name} imports {other} inside a function"


def test_the_first_import_of_a_script_is_runtime_start():
    """Where it was not, tqdm had been imported before its variables were set, and Ctrl-C during the imports
    printed a traceback. It looks for the call of `cli.run` in the script."""
    for name, tree in sources().items():
        if any(isinstance(n, ast.FunctionDef) and n.name == "parse_args" for n in tree.body):
            assert imports(tree)[0] == ("runtime.start", False), name
            assert "cli.run(main" in ast.unparse(tree), name


def test_the_root_has_few_modules():
    assert len([*ROOT.glob("*.py")]) <= 17


def test_every_text_file_is_opened_with_an_encoding():
    """In an ASCII locale doctor and the gallery crashed, and a model's fingerprint changed."""

    def lacks_encoding(call):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if name in ("run", "Popen", "check_output"):
            return given.get("text") and "encoding" not in given
        if name in ("read_text", "write_text"):  # runtime.files.read_text is UTF-8
            return isinstance(call.func, ast.Attribute) and "encoding" not in given
        texts = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
        mode = given.get("mode") or (texts[0] if texts else "r")
        is_open = isinstance(call.func, ast.Name) and name == "open"
        return is_open and "b" not in str(mode) and "encoding" not in given

    calls = [(f, n) for f, tree in sources().items() for n in ast.walk(tree) if type(n) is ast.Call]
    assert not [(name, call.lineno) for name, call in calls if lacks_encoding(call)]
