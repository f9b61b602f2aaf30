"""The inside of evaluation/sandbox.py: shut this process off, run code and tests, say the token. Started as a script.

Standard library only, and nothing of this package: it is what a model's code finds around itself.
"""

import ctypes
import json
import os
import platform
import resource
import sys

# Numbers of system calls that are refused: new processes and programs, sockets, signals, other processes' memory, a
# kernel queue that would do the same unseen, and mounts and namespaces.
REFUSED = {
    "x86_64": (41, 53, 56, 57, 58, 59, 62, 101, 165, 200, 234, 272, 308, 310, 311, 322, 424, 425, 434, 435, 438),
    "aarch64": (40, 97, 117, 129, 130, 131, 198, 199, 220, 221, 268, 270, 271, 281, 424, 425, 434, 435, 438),
}
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # the latter: "operation not permitted"
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
# Rights of files that write, make, remove and (since version 3) truncate; reading and running stay as they are.
WRITING = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter))]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("access", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def limit(seconds, memory_mib, file_mib):
    """Time, memory, files, no core dump."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_mib << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def shut_off(folder):
    """Ask the kernel to refuse everything but computing, reading, and writing below `folder`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long

    def ask(what, *arguments):
        result = libc.syscall(*arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), what)
        return result

    if libc.prctl(38, 1, 0, 0, 0):  # no new privileges, which both want
        raise OSError(ctypes.get_errno(), "prctl")
    version = ask("Landlock", LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    writing = ctypes.c_uint64(WRITING[min(version, 3)])
    rules = ask("Landlock", LANDLOCK_CREATE, ctypes.byref(writing), ctypes.c_size_t(8), 0)
    opened = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    beneath = _Beneath(writing.value, opened)
    ask("Landlock", LANDLOCK_ADD, rules, 1, ctypes.byref(beneath), 0)
    null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    ask("Landlock", LANDLOCK_ADD, rules, 1, ctypes.byref(_Beneath(0x2, null)), 0)
    ask("Landlock", LANDLOCK_RESTRICT, rules, 0)
    for descriptor in (opened, null, rules):
        os.close(descriptor)

    machine = platform.machine()
    steps = [_Filter(0x20, 0, 0, 4), _Filter(0x15, 1, 0, ARCHITECTURE[machine]), _Filter(0x06, 0, 0, REFUSE)]
    steps += [_Filter(0x20, 0, 0, 0), _Filter(0x35, 0, 1, 0x40000000), _Filter(0x06, 0, 0, REFUSE)]  # no second ABI
    for number in REFUSED[machine]:
        steps += [_Filter(0x15, 0, 1, number), _Filter(0x06, 0, 0, REFUSE)]
    steps.append(_Filter(0x06, 0, 0, ALLOW))
    program = _Program(len(steps), (_Filter * len(steps))(*steps))
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main():
    """Do what standard input orders; on success, and only then, write the token to standard output."""
    orders = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limit(orders["seconds"], orders["memory_mib"], orders["file_mib"])
    if orders["by_kernel"]:
        shut_off(orders["folder"])
    token, module = orders.pop("token").encode(), {"__name__": "__main__", "__builtins__": __builtins__}
    code, tests = (compile(orders.pop(part), part, "exec") for part in ("code", "tests"))
    exec(code, module)
    exec(tests, module)
    os.write(answer, token)


if __name__ == "__main__":
    main()
