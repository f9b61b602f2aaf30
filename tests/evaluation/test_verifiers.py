"""Verifiers, and the process that a model's code runs in: what it may not do it cannot, and neither an exit code nor
anything printed passes for a verdict. Code that looks for the verdict in its own interpreter can forge one."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc

import psutil
import pytest

from lightning_llm.evaluation.config import ExactAnswerConfig, FormatConfig, UnitTestsConfig
from lightning_llm.evaluation.judges import JudgeContext, Question, Response
from lightning_llm.evaluation.sandbox import Limits, passes
from lightning_llm.evaluation.verifiers import code_of
from lightning_llm.settings import UserError

HERE = JudgeContext()
SMALL = Limits(seconds=2.0, memory_mib=256)


def question(answer="7", tests=None):
    return Question("sum", "sum 3 4", [1, 2], answer, tests)


def said(text, is_complete=True):
    return Response([5, 6], text, is_complete)


def test_the_exact_answer_is_the_last_line_alone():
    texts = {"answer: 7": 1, "working: 3+4=7\nanswer: 7": 1, "answer: 70": 0, "answer: 7\nsurely": 0, "7": 0}
    judge = ExactAnswerConfig().build(HERE)
    assert [v.score for v in judge([question()] * 5, [said(text) for text in texts])] == list(texts.values())
    assert judge([question()], [said("answer: 7", is_complete=False)])[0].score == 0


def test_a_form_is_matched_by_the_whole_text():
    judge = FormatConfig().build(HERE)
    texts = {"answer: 7": 1, "some\nlines\nanswer: x": 1, "answer:": 0, "nothing": 0}
    assert [v.score for v in judge([question()] * 4, [said(text) for text in texts])] == list(texts.values())
    digits = FormatConfig(pattern=r"\d+").build(HERE)
    assert [v.score for v in digits([question()] * 2, [said("12"), said("12a")])] == [1, 0]
    assert judge([question()], [said("answer: 7", is_complete=False)])[0].score == 0
    with pytest.raises(ValueError, match="no regular expression"):
        FormatConfig(pattern="(")


def test_a_pattern_that_goes_back_without_end_is_given_up():
    endless = FormatConfig(pattern=r"(a|a?)+b").build(HERE)
    began = time.monotonic()
    assert endless([question()], [said("a" * 60)])[0].score == 0
    assert time.monotonic() - began < 20


TESTS = "assert double(4) == 8\nassert double(-1) == -2"
RIGHT = "def double(x):\n    return 2 * x"


def test_unit_tests_tell_right_code_from_wrong():
    judge = UnitTestsConfig(seconds=2.0, memory_mib=256).build(HERE)
    answers = {
        f"Here it is:\n```python\n{RIGHT}\n```\nIt doubles.": 1,
        RIGHT: 1,
        "```\nimport math, json, re, collections\ndef double(x): return math.prod([x, 2])\n```": 1,
        "```python\ndef double(x):\n    return x + 4\n```": 0,
        "def double(x) return 2 * x": 0,
        "I do not know": 0,
    }
    found = judge([question(tests=TESTS)] * len(answers), [said(text) for text in answers])
    assert [v.score for v in found] == list(answers.values())
    with pytest.raises(UserError, match="has no tests"):
        judge([question()], [said(RIGHT)])


def test_code_is_the_first_block():
    assert code_of("a\n```py\nx = 1\n```\nb\n```\ny\n```") == "x = 1\n"
    assert code_of("x = 1") == "x = 1"


FORGERIES = {
    "leaves with success": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "prints and leaves": "import os\nprint('passed', flush=True)\n"
    "for fd in range(3, 32):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
    "swallows errors": "import builtins\nbuiltins.AssertionError = ValueError\nraise SystemExit",
    "is another module": "import sys\nsys.modules['__main__'] = None\nraise KeyboardInterrupt",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES.keys())
def test_neither_leaving_nor_printing_passes_for_a_verdict(code):
    assert not passes(code, TESTS, SMALL)


KNOWN_FORGERIES = {  # docs/methods/judges.md says so; whoever closes one moves it up to the others
    "walks to the calling frame": "import os, sys\nframe = sys._getframe(1).f_locals\n"
    "os.write(frame['answer'], frame['token'])\nos._exit(0)",
    "claims to equal everything": "class Anything:\n    def __eq__(self, other): return True\n"
    "def double(x): return Anything()",
}


@pytest.mark.parametrize("code", KNOWN_FORGERIES.values(), ids=KNOWN_FORGERIES.keys())
def test_known_forgeries_pass(code):
    assert passes(code, TESTS, SMALL)


def tries(what, error="OSError", first=""):
    """Code that leaves in `done` whether it could do something, one statement."""
    return f"{first}\ntry:\n    {what}\n    done = True\nexcept {error}:\n    done = False"


REFUSED = {  # each would fail its test where it could do what it tries
    "another process": tries("os.fork() or os._exit(0)"),
    "a program": tries("os.execv('/bin/true', ['true'])"),
    "a shell": tries("subprocess.run(['true'])", first="import subprocess"),
    "a thread": tries("threading.Thread(target=print).start()", "RuntimeError", "import threading"),
    "a socket": tries("socket.socket()", first="import socket"),
    "a local socket": tries("socket.socketpair()", first="import socket"),
    "a signal": tries(f"os.kill({os.getpid()}, 0)"),
    "a file elsewhere": tries("open('/tmp/lightning-llm-was-here', 'w')"),
    "a file that goes": tries("os.remove(VICTIM)"),
    "a file cut short": tries("os.truncate(VICTIM, 0)"),
    "a folder elsewhere": tries("os.mkdir('/tmp/lightning-llm-was-here')"),
    "another's mode": tries("os.chmod(VICTIM, 0o777)"),
    "another's owner": tries("os.chown(VICTIM, 1, 1)"),
    "another's times": tries("os.utime(VICTIM, (0, 0))"),
    "a higher limit": tries(
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))", "(ValueError, OSError)", "import resource"
    ),
    "the parent's limit": tries(
        f"resource.prlimit({os.getpid()}, resource.RLIMIT_CORE, (0, 0))", "OSError", "import resource"
    ),
    "a namespace": tries("ctypes.CDLL(None).unshare(0x10000000) == 0 or bool(open('/nowhere'))", first="import ctypes"),
    "much memory": tries("x = bytearray(1 << 30)", "MemoryError"),
    "many files": tries("kept = [open('/dev/null') for _ in range(100)]"),
    "what the parent was told": "done = bool(set(os.environ) - {'PATH', 'LC_CTYPE'})",
}


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_computing_is_refused(code, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    before = f"import os\nVICTIM = {str(victim)!r}\n"
    assert passes(before + code, "assert done is False", SMALL)
    assert victim.read_text() == "kept"


def test_its_own_folder_is_there_and_goes_with_it():
    code = "import os\nopen('mine', 'w').write('x')\nos.mkdir('sub')\nfolder = os.getcwd()"
    assert passes(code, "assert sorted(os.listdir()) == ['mine', 'sub'] and open('mine').read() == 'x'", SMALL)


def test_a_file_is_no_larger_than_it_may_be():
    code = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # the write is cut short instead
    code += "written = open('here', 'wb', buffering=0).write(bytes(8 << 20))"
    assert passes(code, "assert written == 1 << 20", SMALL)


LEFT_BEHIND = {
    "a deep folder": "import os\nfor _ in range(3000): os.mkdir('d'), os.chdir('d')",
    "a closed folder": "import os\nos.makedirs('a/b/c')\nos.mkdir('a/b/shut', 0)\nos.mkdir('gone', 0)",
    "links": "import os\nos.mkdir('sub')\nos.symlink('/tmp', 'sub/out')\nos.symlink('sub', 'in')",
}


@pytest.mark.parametrize("by_kernel", [True, False])  # a file system of its own, or the folder itself
@pytest.mark.parametrize("code", LEFT_BEHIND.values(), ids=LEFT_BEHIND.keys())
def test_whatever_it_leaves_behind_goes(code, by_kernel, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes(code, "", dataclasses.replace(SMALL, by_kernel=by_kernel))
    assert list(tmp_path.iterdir()) == []


FLOODS = {
    "entries": ("open(str(n), 'w').close()", 4096),
    "bytes": ("open(str(n), 'wb').write(bytes(1 << 20))", 64),
}


@pytest.mark.parametrize(("flood", "most"), FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_ends_where_its_own_file_system_does(flood, most):
    mounting = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/tmp"]
    if shutil.which("unshare") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("this kernel lets nobody mount a file system")
    code = f"n = 0\ntry:\n    while n < 10_000:\n        {flood}\n        n += 1\nexcept OSError: pass"
    assert passes(code, f"assert {most // 2} < n <= {most}, n", Limits(seconds=5.0, memory_mib=256))


def test_a_full_disk_is_named(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc")  # where nobody may make a folder
    with pytest.raises(UserError, match="TMPDIR: /proc takes no folder"):
        passes("", "", SMALL)


def test_it_ends_with_whoever_has_started_it():
    """Also a trainer that is killed leaves no code behind."""
    started = "from lightning_llm.evaluation.sandbox import Limits, passes; passes('import time; time.sleep(999)', '', "
    parent = subprocess.Popen([sys.executable, "-c", f"{started} Limits(seconds=500.0))"])
    try:
        [child] = wait_for(lambda: psutil.Process(parent.pid).children())
        wait_for(lambda: child.num_ctx_switches().voluntary and child.status() == psutil.STATUS_SLEEPING)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not psutil.pid_exists(child.pid))


def wait_for(found, seconds=30.0):
    """What `found` finds, as soon as it does."""
    until = time.monotonic() + seconds
    while not (what := found()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return what


OWN_MODULE = {
    "a guarded main program": "if __name__ == '__main__': raise SystemExit",
    "pickle": "import pickle\nclass A: pass\nassert pickle.loads(pickle.dumps(A()))",
    "hints": "from __future__ import annotations\nimport typing\nclass A:\n    a: A\nassert typing.get_type_hints(A)",
    "a temporary file": "import tempfile\nwith tempfile.NamedTemporaryFile(dir='.') as file: file.write(b'x')",
}


@pytest.mark.parametrize("code", OWN_MODULE.values(), ids=OWN_MODULE.keys())
def test_code_is_a_module_of_its_own(code):
    assert passes(code, "", SMALL)


def test_what_it_says_takes_no_memory_of_ours():
    tracemalloc.start()
    assert not passes("import os\nb = bytes(1 << 20)\nfor _ in range(500): os.write(3, b)", "", SMALL)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_it_says_is_no_longer_than_a_file_may_be():
    code = "import os, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nsaid = 0\n"
    code += "try:\n    while said < 64 << 20: said += os.write(3, bytes(1 << 18))\nexcept OSError: pass\n"
    code += "os.lseek(3, 0, 0), os.ftruncate(3, 0)"  # so that the verdict can be said after all
    assert passes(code, "assert said == 1 << 20", SMALL)


def test_it_may_read_and_import():
    assert passes("import json, dataclasses, statistics\nx = json.loads('[1, 2]')", "assert sum(x) == 3", SMALL)


ENDLESS = {
    "a loop": "while True: pass",
    "sleep": "import time\ntime.sleep(100)",
    "words": "while True: print('x' * 10**6)",
    "growth": "x = []\nwhile True: x.append(x[:])",
}


@pytest.mark.parametrize("code", ENDLESS.values(), ids=ENDLESS.keys())
def test_what_does_not_end_is_ended(code, monkeypatch):
    monkeypatch.setattr("lightning_llm.evaluation.sandbox.STARTING", 2.0)
    began = time.monotonic()
    assert not passes(code, "", Limits(seconds=0.5, memory_mib=256))
    assert time.monotonic() - began < 20  # 3 on a calm machine


def test_without_the_kernel_time_and_memory_are_limited_all_the_same():
    weak = Limits(seconds=1.0, memory_mib=256, by_kernel=False)
    assert passes(RIGHT, TESTS, weak)
    assert not passes("x = bytearray(1 << 30)", "", weak)
    assert passes("import os\n" + tries("os.getpid()"), "assert done is True", weak)
    assert passes("import os\n" + REFUSED["a signal"], "assert done is True", weak)  # as its name says


def test_settings_that_mean_nothing():
    for wrong in ({"seconds": 0}, {"memory_mib": 1}, {"processes": 0}, {"isolation": "none"}):
        with pytest.raises(ValueError, match=re.escape(next(iter(wrong)))):
            UnitTestsConfig(**wrong)
