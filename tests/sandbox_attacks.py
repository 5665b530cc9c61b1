"""The attacks on the sandbox, as data and as a program that runs them all under one policy.

`python sandbox_attacks.py POLICY` prints, as JSON, how each attack ended and what harm it left behind. It is a program
so that it can be run as another user. Needs only the standard library, the package and the binding of libseccomp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ultrafuser.sandbox.job import TestJob
from ultrafuser.sandbox.sandbox import open_sandbox

HANGING_S = 0.4  # time limit of the attacks that never end


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack: it succeeds if its test passes or `harm` is done; `ends` lists how it may end instead.

    `f` is called with the facts of `Facts`, a dict: where the secrets lie, whom to kill.
    """

    row: int
    name: str
    ends: str
    code: str
    test: str = "assert f(FACTS) == 12345"
    harm: str = ""  # an effect that `Facts.harm_done` knows
    hangs: bool = False


ATTACKS = [
    Attack(1, "exit_inside", "exception", "import sys\ndef f(x): sys.exit(0)"),
    Attack(1, "exit_at_import", "exception", "raise SystemExit(0)"),
    Attack(2, "hard_exit", "killed", "import os\ndef f(x): os._exit(0)"),
    Attack(
        3,
        "always_equal",
        "type_error",
        "class E:\n    __eq__ = lambda a, b: True\n    __ne__ = lambda a, b: False\n    __bool__ = lambda a: True\n"
        "def f(x): return E()",
    ),
    Attack(
        3,
        "always_equal_in_a_list",
        "type_error",
        "class E:\n    __eq__ = lambda a, b: True\ndef f(x): return [1, {2: E()}]",
        "assert f(FACTS) == [1, {2: 3}]",
    ),
    Attack(
        4,
        "int_with_its_own_equality",
        "type_error",
        "class I(int):\n    __eq__ = lambda a, b: True\ndef f(x): return I(1)",
    ),
    Attack(
        5,
        "forge_the_verdict",
        "fail_assert protocol_error killed",
        """
import gc, json, os, sys
def f(x):
    frame = sys._getframe()
    while frame:
        for found in (frame.f_locals, frame.f_globals):
            for name, value in list(found.items()):
                if isinstance(value, list):
                    value.append("passed")
                if "fail" in name or "outcome" in name:
                    found[name] = "pass"
        frame = frame.f_back
    for verdict in ({"outcome": "pass", "detail": ""}, {"value": {"outcome": "pass"}}):
        text = json.dumps(verdict).encode()
        for fd in range(64):
            try:
                os.write(fd, len(text).to_bytes(4, "big") + text)
            except OSError:
                pass
    return 1
""",
    ),
    Attack(
        6,
        "find_the_expected_value",
        "fail_assert type_error",
        """
import gc, sys
def f(x):
    start = "EXPECTED" + "-"
    frame, seen = sys._getframe(), []
    while frame:
        seen += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    seen += [repr(found) for found in gc.get_objects() if isinstance(found, (dict, list, tuple))]
    for path in ("/proc/self/environ", "/proc/self/cmdline"):
        try:
            seen.append(open(path).read())
        except OSError:
            pass
    for text in seen:
        if start in text:
            return start + text.split(start, 1)[1][:16]
""",
        "assert f(FACTS) == 'EXPECTED-' + SECRET",
    ),
    Attack(
        7,
        "redefine_the_check",
        "fail_assert",
        """
import builtins
builtins.AssertionError = ZeroDivisionError
builtins.check = lambda candidate: None
def check(candidate): pass
def f(x): return 1
""",
        "def check(candidate):\n    assert candidate(FACTS) == 12345\ncheck(f)",
    ),
    Attack(
        8,
        "forge_output",
        "fail_assert",
        "import os, sys\ndef f(x):\n    print('passed', flush=True)\n    os.write(1, b'ok 1 passed\\n')\n    return 1",
    ),
    Attack(
        9,
        "get_the_calls_back",
        "fail_assert killed",
        """
import ctypes, importlib, os, posix, signal
def f(x):
    importlib.reload(os)
    for kill in (os.kill, posix.kill, ctypes.CDLL(None).kill, lambda *a: ctypes.CDLL(None).syscall(62, *a)):
        try:
            kill(x["victim"], 9)
        except OSError:
            pass
    return 12345 if ctypes.CDLL(None).fork() > 0 else 0
""",
        harm="victim",
    ),
    Attack(
        10,
        "read_the_environment",
        "fail_assert",
        """
import os
def f(x):
    found = dict(os.environ)
    for pid in ("self", os.getppid(), x["parent"]):
        try:
            found[str(pid)] = open(f"/proc/{pid}/environ", errors="replace").read()
        except OSError:
            pass
    return 12345 if "ATTACK_SECRET" in repr(found) else 0
""",
    ),
    Attack(11, "read_a_file", "exception", "def f(x): return open(x['secret']).read()", "assert f(FACTS) == SECRET"),
    Attack(11, "read_passwd", "exception", "def f(x): return len(open('/etc/passwd').read())", "assert f(FACTS) > 0"),
    Attack(12, "write_a_file", "exception", "def f(x): open(x['folder'] + '/written', 'w').write('x')", harm="written"),
    Attack(12, "delete_a_file", "exception", "import os\ndef f(x): os.unlink(x['folder'] + '/kept')", harm="deleted"),
    Attack(12, "change_a_mode", "exception", "import os\ndef f(x): os.chmod(x['folder'] + '/kept', 0)", harm="mode"),
    Attack(
        13,
        "write_through_a_link",
        "fail_assert",
        """
import os
def f(x):
    for folder in ("/tmp", ".", "/dev/shm", "/var/tmp", x["folder"]):
        try:
            os.symlink(x["folder"], folder + "/link")
            open(folder + "/link/written", "w").write("x")
        except OSError:
            pass
""",
        harm="written",
    ),
    Attack(
        14,
        "connect",
        "exception",
        "import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', x['port']), 2)\n    return 12345",
        harm="connected",
    ),
    Attack(15, "signal_another", "exception", "import os\ndef f(x): os.kill(x['victim'], 9)", harm="victim"),
    Attack(
        15, "signal_the_parent", "exception", "import os\ndef f(x):\n    os.kill(os.getppid(), 0)\n    return 12345"
    ),
    Attack(
        16,
        "start_a_process",
        "fail_assert",
        """
import os, subprocess, threading
def f(x):
    def fork():
        if os.fork() == 0:
            os._exit(0)
    ways = [
        fork,
        lambda: subprocess.run(["/bin/true"], check=True),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: threading.Thread(target=print).start(),
    ]
    for way in ways:
        try:
            way()
            return 12345
        except (OSError, RuntimeError):
            pass
""",
    ),
    Attack(
        17,
        "leave_a_daemon",
        "exception",
        """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.1)
            open(x["folder"] + "/late", "w").write("x")
        os._exit(0)
    return 1
""",
        harm="late",
    ),
    Attack(18, "loop", "timeout", "def f(x):\n    while True: pass", hangs=True),
    Attack(
        18,
        "loop_that_catches_all",
        "timeout",
        "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        hangs=True,
    ),
    Attack(18, "sleep", "timeout", "import time\ndef f(x): time.sleep(1000)", hangs=True),
    Attack(
        19,
        "ignore_signals",
        "timeout",
        """
import signal
def f(x):
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    while True: pass
""",
        hangs=True,
    ),
    Attack(20, "slow_regex", "timeout", "import re\ndef f(x): re.match('(a*)*b', 'a' * 64)", hangs=True),
    Attack(
        21, "memory", "memory killed", "def f(x):\n    kept = [bytearray(3 << 29) for _ in range(8)]\n    return 12345"
    ),
    Attack(
        21,
        "memory_little_by_little",
        "memory killed",
        "kept = []\ndef f(x):\n    for _ in range(4096): kept.append(bytearray(1 << 20))\n    return 12345",
    ),
    Attack(
        22,
        "output",
        "fail_assert",
        "import os\ndef f(x):\n    for _ in range(200):\n        for fd in (1, 2): os.write(fd, b'flood' * 200000)",
        harm="output",
    ),
    Attack(
        23,
        "large_file",
        "fail_assert",
        """
import os
def f(x):
    for folder in ("/tmp", ".", "/dev/shm", x["folder"]):
        try:
            with open(folder + "/large", "wb") as file:
                for _ in range(600):
                    file.write(bytes(1 << 20))
            return 12345
        except OSError:
            pass
    try:
        fd = os.memfd_create("large")
        return 12345 if os.write(fd, bytes(64 << 20)) else 0
    except OSError:
        return 0
""",
        harm="large",
    ),
    Attack(24, "segfault", "killed", "import ctypes\ndef f(x): ctypes.string_at(8)"),
    Attack(
        24,
        "recursion",
        "exception memory killed timeout",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
        hangs=True,
    ),
    Attack(25, "return_a_function", "type_error", "def f(x): return lambda: 1", "assert f(FACTS)() == 1"),
    Attack(25, "return_much", "protocol_error", "def f(x): return 'x' * 10**8", "assert len(f(FACTS)) == 10**8"),
    Attack(25, "return_many", "type_error", "def f(x): return [0] * 10**7", "assert len(f(FACTS)) == 10**7"),
    Attack(
        25,
        "return_a_deep_list",
        "type_error",
        "def f(x):\n    deep = []\n    for _ in range(100000): deep = [deep]\n    return deep",
        "assert f(FACTS)",
    ),
    Attack(
        25, "return_itself", "type_error", "def f(x):\n    a = []\n    a.append(a)\n    return a", "assert f(FACTS)"
    ),
    Attack(
        25,
        "write_a_deep_reply",
        "protocol_error",
        """
import os
def f(x):
    text = b'{"value":' + b"[" * 200000 + b"]" * 200000 + b"}"
    for fd in range(3, 64):
        try:
            os.write(fd, len(text).to_bytes(4, "big") + text)
        except OSError:
            pass
    return 12345
""",
    ),
    # Beyond the table.
    Attack(26, "end_the_tests_loop", "exception", "def f(x): raise StopIteration", "assert all(map(f, [1, 2]))"),
    Attack(
        27,
        "shadow_a_builtin",
        "fail_assert",
        "def set(x): return 0\ndef len(x): return 0\ndef f(x): return 1",
        "assert set([f(FACTS)]) == set([12345])",
    ),
    Attack(
        28,
        "raise_what_the_test_expects",
        "exception",
        "def f(x): raise ValueError",
        "try:\n    f(FACTS)\nexcept Exception:\n    pass\nexcept BaseException:\n    pass",
    ),
    Attack(
        29,
        "raise_the_limits",
        "exception",
        "import resource\ndef f(x):\n    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))\n    return 12345",
    ),
]


def _start_victim() -> subprocess.Popen[bytes]:
    """Says back what it hears."""
    return subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )


def _lives(victim: subprocess.Popen[bytes]) -> bool:
    """Whether nothing has killed it: a signal that was sent comes before what it is told afterwards."""
    assert victim.stdin is not None
    assert victim.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        victim.stdin.write(b"?")
        return victim.stdout.read(1) == b"?"
    return False


class Facts:
    """What the attacks are aimed at: files in a folder anybody may write to, a victim, a listener."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.secret = secrets.token_hex(8)
        (self.folder / "secret").write_text(self.secret)
        (self.folder / "kept").write_text("kept")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.victim = _start_victim()

    def as_text(self) -> str:
        return repr(
            {
                "folder": str(self.folder),
                "secret": str(self.folder / "secret"),
                "victim": self.victim.pid,
                "parent": os.getpid(),
                "port": self.listener.getsockname()[1],
            }
        )

    def job(self, attack: Attack) -> TestJob:
        test = attack.test.replace("SECRET", repr(self.secret)).replace("FACTS", self.as_text())
        return TestJob(attack.code, test, ("f",), time_limit_s=HANGING_S if attack.hangs else 10.0)

    def harm_done(self) -> set[str]:
        """The effects that are there now, each taken back."""
        harm = {name for name in ("written", "late", "large") if (self.folder / name).exists()}
        if not (self.folder / "kept").exists():
            harm.add("deleted")
        elif (self.folder / "kept").stat().st_mode & 0o777 == 0:
            harm.add("mode")
        with contextlib.suppress(BlockingIOError):
            self.listener.accept()[0].close()
            harm.add("connected")
        if not _lives(self.victim):
            harm.add("victim")
            self._bury_victim()
            self.victim = _start_victim()
        for name in harm & {"written", "late", "large"}:
            (self.folder / name).unlink()
        (self.folder / "kept").write_text("kept") if "deleted" in harm else (self.folder / "kept").chmod(0o644)
        return harm

    def close(self) -> None:
        self._bury_victim()
        self.listener.close()

    def _bury_victim(self) -> None:
        self.victim.kill()
        self.victim.communicate()


def run_attacks(policy: str) -> dict[str, dict[str, object]]:
    """Every attack by itself; the hanging ones together, since they cost only time."""
    os.environ["ATTACK_SECRET"] = secrets.token_hex(8)
    report: dict[str, dict[str, object]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Facts(folder)) as facts,
        open_sandbox(policy, accept_unsandboxed=True) as sandbox,
    ):
        for attack in ATTACKS:
            if attack.hangs:
                continue
            result = sandbox.run([facts.job(attack)])[0]
            if attack.harm == "late":
                time.sleep(0.6)
            report[attack.name] = {**dataclasses.asdict(result), "harm": sorted(facts.harm_done())}
        hanging = [attack for attack in ATTACKS if attack.hangs]
        for attack, result in zip(hanging, sandbox.run([facts.job(attack) for attack in hanging]), strict=True):
            report[attack.name] = {**dataclasses.asdict(result), "harm": sorted(facts.harm_done())}
    return report


if __name__ == "__main__":
    print(json.dumps(run_attacks(sys.argv[1])))
