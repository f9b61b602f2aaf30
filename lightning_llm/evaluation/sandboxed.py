"""The inside of evaluation/sandbox.py: shut this process off, run code and tests, say the token. Started as a script.

Standard library only, and nothing of this package: it is what a model's code finds around itself.
"""

import ctypes
import json
import os
import platform
import resource
import sys
import types

# Numbers of the system calls that computing, reading and writing take; all others are refused, those too that later
# kernels bring. Missing are new processes and programs, sockets, signals, other processes, locks, shared memory, and
# owners, modes, times and attributes of files, which Landlock does not guard.
ALLOWED = {
    "x86_64": (
        *range(16), *range(17, 29), *range(32, 40), 60, 63, *range(74, 90), *range(95, 101), 102, 104, 107, 108,
        110, 111, 115, 131, 137, 138, 158, 186, 201, 202, 204, 217, 218, 219, *range(228, 232), 257, 258,
        *range(262, 268), 269, 270, 271, 273, 292, 293, 316, 318, 332, 334, 436, 437, 439, 449,
    ),
    "aarch64": (
        17, 23, 24, *range(34, 39), *range(43, 47), 48, 49, 50, 56, 57, 59, *range(61, 69), 72, 73, 78, 79, 80,
        82, 83, 93, 94, 96, 98, 99, 101, 102, 103, 113, 114, 115, 123, 124, 128, 132, *range(134, 137), 139, 153,
        158, 160, 163, 165, 166, 169, *range(172, 180), 214, 215, 216, 222, 226, 227, 232, 233, 276, 278, 291, 293,
        436, 437, 439, 449,
    ),
}  # fmt: skip
# Some depend on an argument, by its place: limits are those of oneself (0), fcntl names nobody to be signalled and
# locks nothing, ioctl only says whether a descriptor outlives exec.
OF_FILES, OF_EXEC = (0, 1, 2, 3, 4, 1030), (0x5450, 0x5451)
ALLOWED_WITH = {
    "x86_64": {302: (0, (0,)), 72: (1, OF_FILES), 16: (1, OF_EXEC)},
    "aarch64": {261: (0, (0,)), 25: (1, OF_FILES), 29: (1, OF_EXEC)},
}
SET_CAPABILITIES = {"x86_64": 126, "aarch64": 91}
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # the latter: "operation not permitted"
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITING = 0x7FF2  # rights that write, make, remove, link and truncate files; reading stays as it is
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # namespaces
PRIVATE, NO_DEVICES = 0x4000 | 0x40000, 2 | 4  # of mounts
FOLDER = b"size=64m,nr_inodes=4096,mode=700"  # what may stand in the folder, where it is a file system of its own
TRUNCATES = 3  # the first version of Landlock (Linux 6.2) that guards against a file being cut short


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


def end_with(parent):
    """Be killed when the process that has started this one is; who is too late ends here."""
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        os._exit(1)


def bound(folder):
    """Put a small file system of this process's own, in memory, over `folder`; nothing, where no user may do so."""
    libc = ctypes.CDLL(None)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(NEW_MOUNTS):
        if libc.unshare(NEW_MOUNTS | NEW_USER):
            return
        try:
            for name, said in ("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1"):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(said)
        except OSError:  # some kernels give a namespace without any rights in it
            return
    if not libc.mount(b"none", b"/", None, PRIVATE, None):
        libc.mount(b"tmpfs", folder.encode(), b"tmpfs", NO_DEVICES, FOLDER)
        os.chdir(folder)


def shut_off(folder, parent):
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
    # A user like root has privileges already: to lift its own limits, to reach other users' files.
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ask("capabilities", SET_CAPABILITIES[platform.machine()], ctypes.byref(header), ctypes.byref(nothing))
    end_with(parent)  # once more: other capabilities and namespaces make the kernel forget it
    if ask("Landlock", LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1) < TRUNCATES:
        raise OSError("Landlock is too old")
    writing = ctypes.c_uint64(WRITING)
    rules = ask("Landlock", LANDLOCK_CREATE, ctypes.byref(writing), ctypes.c_size_t(8), 0)
    opened = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    beneath = _Beneath(writing.value, opened)
    ask("Landlock", LANDLOCK_ADD, rules, 1, ctypes.byref(beneath), 0)
    null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    ask("Landlock", LANDLOCK_ADD, rules, 1, ctypes.byref(_Beneath(0x2, null)), 0)
    ask("Landlock", LANDLOCK_RESTRICT, rules, 0)
    for descriptor in (opened, null, rules):
        os.close(descriptor)

    steps = filter_of(platform.machine())
    program = _Program(len(steps), (_Filter * len(steps))(*steps))
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def filter_of(machine):
    """What seccomp runs at each system call: a program for a machine with one accumulator (BPF)."""

    def load(offset):
        return _Filter(0x20, 0, 0, offset)

    def end_if(number, verdict):
        return [_Filter(0x15, 0, 1, number), _Filter(0x06, 0, 0, verdict)]

    refuse = _Filter(0x06, 0, 0, REFUSE)
    steps = [load(4), _Filter(0x15, 1, 0, ARCHITECTURE[machine]), refuse]
    steps += [load(0), _Filter(0x35, 0, 1, 0x40000000), refuse]  # no second ABI
    for number, (place, values) in ALLOWED_WITH[machine].items():
        inside = [load(16 + 8 * place), *(step for value in values for step in end_if(value, ALLOW)), refuse]
        steps += [_Filter(0x15, 0, len(inside), number), *inside]
    for number in ALLOWED[machine]:
        steps += end_if(number, ALLOW)
    return [*steps, refuse]


def main():
    """Do what standard input orders; on success, and only then, write the token to standard output."""
    orders = json.loads(sys.stdin.buffer.read())
    end_with(orders["parent"])
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limit(orders["seconds"], orders["memory_mib"], orders["file_mib"])
    if orders["by_kernel"]:
        bound(orders["folder"])
        shut_off(orders["folder"], orders["parent"])
    token, module = orders.pop("token").encode(), types.ModuleType("solution")  # nothing is guarded as a main program
    sys.modules["solution"] = module
    code, tests = (compile(orders.pop(part), part, "exec") for part in ("code", "tests"))
    exec(code, module.__dict__)
    exec(tests, module.__dict__)
    os.write(answer, token)


if __name__ == "__main__":
    main()
