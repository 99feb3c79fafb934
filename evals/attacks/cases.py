"""Attacks on the operating system and its resources, as a method would carry them out that nobody audited.

Each is the body of a method that returns True where it got what it wanted. `os`, `sys`, `ctypes` and `libc`
are at hand, as they are to whoever escapes from Python's surface; `scene` says what there is to be won: a
`secret` file that only its owner reads, a `folder` open to all, a listening `port`, an `abstract` socket, a
`victim` process of the same user, the `kernel` that runs the hands. System calls without a name in the C
library have the numbers of x86_64.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

PROLOGUE = """\
import random
os = random._os
sys = os.sys
ctypes, socket, resource = (sys.modules[name] for name in ("ctypes", "socket", "resource"))
libc = ctypes.CDLL(None, use_errno=True)
"""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack; `body` is the lines of its method after the prologue."""

    name: str
    body: str

    def source(self) -> str:
        """Returns the method `attack(self, scene)`."""
        return "def attack(self, scene):\n" + textwrap.indent(PROLOGUE + textwrap.dedent(self.body), "    ")


def _attack(name: str, *lines: str) -> Attack:
    return Attack(name, "\n".join(lines) + "\n")


READING = (
    _attack("read a secret file", "return b'sesame' in os.read(os.open(scene['secret'], 0), 99)"),
    _attack("read /etc/passwd", "return b'root' in os.read(os.open('/etc/passwd', 0), 99)"),
    _attack("read by io.FileIO", "return bool(sys.modules['io'].FileIO('/etc/passwd').read(9))"),
    _attack(
        "read by openat2",
        "how = (ctypes.c_uint64 * 3)()",
        "return libc.syscall(437, -100, b'/etc', how, 24) >= 0",
    ),
    _attack("list the root", "return 'etc' in os.listdir('/')"),
    _attack("list by scandir", "return any(entry.name for entry in os.scandir('/usr'))"),
    _attack("look for a file", "return os.stat(scene['secret']).st_size > 0"),
    _attack("follow a link of /proc", "return bool(os.readlink('/proc/self/exe'))"),
    _attack(
        "read the kernel's environment",
        "fd = os.open(f\"/proc/{scene['kernel']}/environ\", 0)",
        "return bool(os.read(fd, 9))",
    ),
    _attack(
        "read the kernel's memory map",
        "fd = os.open(f\"/proc/{scene['kernel']}/maps\", 0)",
        "return bool(os.read(fd, 9))",
    ),
    _attack("read the system's log", "return libc.klogctl(3, ctypes.create_string_buffer(99), 99) >= 0"),
    _attack(
        "watch a folder",
        "fd = libc.inotify_init1(0)",
        "return fd >= 0 and libc.inotify_add_watch(fd, b'/etc', 0x100) >= 0",
    ),
    _attack("learn the user", "return libc.getuid() >= 0"),
)
WRITING = (
    _attack(
        "create a file", "fd = os.open(scene['folder'] + '/new', os.O_CREAT | os.O_WRONLY)", "return fd >= 0"
    ),
    _attack("change a file", "fd = os.open(scene['open'], os.O_WRONLY)", "return os.write(fd, b'x') == 1"),
    _attack("truncate a file", "return os.truncate(scene['open'], 0) is None"),
    _attack("delete a file", "return os.unlink(scene['doomed']) is None"),
    _attack("rename a file", "return os.rename(scene['open'], scene['folder'] + '/other') is None"),
    _attack("make a folder", "return os.mkdir(scene['folder'] + '/sub') is None"),
    _attack("make a link", "return os.symlink('/etc', scene['folder'] + '/etc') is None"),
    _attack("make a hard link", "return os.link(scene['open'], scene['folder'] + '/hard') is None"),
    _attack("make a FIFO", "return os.mkfifo(scene['folder'] + '/fifo') is None"),
    _attack("change a mode", "return os.chmod(scene['open'], 0o777) is None"),
    _attack("leave the working folder", "return os.chdir('/usr') is None"),
    _attack("make a file in memory", "return os.memfd_create('x') >= 0"),
)
NETWORK = (
    _attack("connect over TCP", "socket.create_connection(('127.0.0.1', scene['port']), 1)", "return True"),
    _attack(
        "send over UDP",
        "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "return one.sendto(b'x', ('127.0.0.1', scene['port'])) == 1",
    ),
    _attack("listen", "one = socket.socket()", "one.bind(('127.0.0.1', 0))", "return one.listen() is None"),
    _attack(
        "connect to an abstract socket",
        "one = socket.socket(socket.AF_UNIX)",
        "return one.connect('\\0' + scene['abstract']) is None",
    ),
    _attack(
        "make a raw socket",
        "return bool(socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))",
    ),
    _attack("make a socket pair", "return bool(socket.socketpair())"),
    _attack("ask netlink", "return bool(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))"),
)
PROCESSES = (
    _attack("fork", "pid = os.fork()", "if pid == 0:", "    os._exit(0)", "return pid > 0"),
    _attack(
        "fork a daemon",
        "pid = os.fork()",
        "if pid == 0:",
        "    os.setsid()",
        "    os._exit(0)",
        "return pid > 0",
    ),
    _attack("start a thread", "return sys.modules['_thread'].start_new_thread(len, ('',)) > 0"),
    _attack(
        "start a program",
        "pid = os.posix_spawn('/bin/true', ['true'], {})",
        "return os.waitpid(pid, 0)[1] == 0",
    ),
    _attack("become a program", "os.execv('/bin/touch', ['touch', scene['folder'] + '/new'])"),
    _attack(
        "run a program from memory",
        "fd = os.memfd_create('x')",
        "return os.execve in os.supports_fd and fd >= 0",
    ),
    _attack("signal the victim", "return os.kill(scene['victim'], 0) is None"),
    _attack("kill the victim", "return os.kill(scene['victim'], 9) is None"),
    _attack("signal everybody", "return os.kill(-1, 0) is None"),
    _attack("signal its zygote", "return os.kill(os.getppid(), 0) is None"),
    _attack(
        "read the victim's memory", "fd = os.open(f\"/proc/{scene['victim']}/mem\", 0)", "return fd >= 0"
    ),
    _attack("trace the victim", "return libc.ptrace(0x4206, scene['victim'], 0, 0) == 0"),
    _attack(
        "reach into the victim",
        "here = ctypes.create_string_buffer(8)",
        "one = (ctypes.c_uint64 * 2)(ctypes.addressof(here), 8)",
        "return libc.process_vm_readv(scene['victim'], one, 1, one, 1, 0) >= 0 or ctypes.get_errno() == 14",
    ),
    _attack(
        "take a descriptor of the kernel",
        "fd = libc.syscall(434, scene['kernel'], 0)",
        "return libc.syscall(438, fd, 0, 0) >= 0",
    ),
    _attack("limit the victim", "return resource.prlimit(scene['victim'], resource.RLIMIT_CORE) is not None"),
    _attack("put the victim last", "return os.setpriority(os.PRIO_PROCESS, scene['victim'], 19) is None"),
    _attack("pin to a processor", "return os.sched_setaffinity(0, os.sched_getaffinity(0)) is None"),
)
PRIVILEGES = (
    _attack(
        "become root",
        "os.setuid(0)",
        "return os.getuid() == 0",
    ),
    _attack("make a user namespace", "return libc.unshare(0x10000000) == 0"),
    _attack(
        "mount",
        "return libc.mount(b'none', b'/mnt', b'tmpfs', 0, None) == 0 and libc.umount(b'/mnt') == 0",
    ),
    _attack(
        "change the root",
        "return os.chroot('/') is None",
    ),
    _attack(
        "name the machine",
        "name = os.uname().nodename.encode()",
        "return libc.sethostname(name, len(name)) == 0",
    ),
    _attack(
        "raise its limits",
        "most = resource.getrlimit(resource.RLIMIT_CPU)[1]",
        "resource.setrlimit(resource.RLIMIT_CPU, (most, -1))",
        "return most != -1 or True",
    ),
    _attack(
        "take real time",
        "return os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) is None",
    ),
    _attack(
        "make code",
        "size, flags = 4096, 0x22",
        "libc.mmap.restype = ctypes.c_void_p",
        "place = libc.mmap(None, ctypes.c_size_t(size), 7, flags, -1, ctypes.c_long(0))",
        "return place not in (None, 2**64 - 1)",
    ),
    _attack(
        "make data code",
        "libc.mmap.restype = ctypes.c_void_p",
        "place = libc.mmap(None, ctypes.c_size_t(4096), 3, 0x22, -1, ctypes.c_long(0))",
        "return libc.mprotect(ctypes.c_void_p(place), ctypes.c_size_t(4096), 5) == 0",
    ),
    _attack(
        "trace the whole machine",
        "return libc.syscall(298, (ctypes.c_uint64 * 16)(), -1, 0, -1, 0) >= 0",
    ),
    _attack(
        "load a BPF program",
        "return libc.syscall(321, 0, (ctypes.c_uint64 * 16)(4 << 32 | 2, 1 << 32 | 4), 128) >= 0",
    ),
    _attack(
        "use io_uring",
        "return libc.syscall(425, 4, ctypes.create_string_buffer(120)) >= 0",
    ),
    _attack("use the key ring", "return libc.syscall(250, 0, -3, 1) > 0"),
    _attack(
        "share memory",
        "place = libc.shmget(0, 4096, 0o1600)",
        "return place >= 0 and libc.shmctl(place, 0, None) == 0",
    ),
    _attack(
        "handle faults",
        "return libc.syscall(323, 1) >= 0",
    ),
    _attack("allow dumps of itself", "return libc.prctl(4, 1, 0, 0, 0) == 0"),
    _attack("outlive its parent", "return libc.prctl(1, 0, 0, 0, 0) == 0"),
)
DESCRIPTORS = (
    _attack(
        "write to what it inherited",
        "for fd in range(4, 1024):",
        "    try:",
        "        os.fstat(fd)",
        "    except OSError:",
        "        continue",
        "    return True",
    ),
    _attack("copy a descriptor", "return os.dup(0) > 0"),
    _attack("make a pipe", "return bool(os.pipe())"),
    _attack("make an event", "return os.eventfd(0) > 0"),
    _attack("make a poll set", "return bool(sys.modules['select'].epoll())"),
)
SYSTEM = {
    "reading": READING,
    "writing": WRITING,
    "network": NETWORK,
    "processes": PROCESSES,
    "privileges": PRIVILEGES,
    "descriptors": DESCRIPTORS,
}

# What uses up a machine; each is ended by a limit, whatever else is in its way.
EXHAUSTION = (
    _attack("loop for ever", "while True:", "    pass"),
    _attack("loop in C", "return sum(range(10**12))"),
    _attack("count for ever", "return 9**9**9**9"),
    _attack("match for ever", "import re", "return re.match('(a+)+$', 'a' * 64 + 'b')"),
    _attack("sleep", "import time", "time.sleep(3600)"),
    _attack(
        "ignore every exception",
        "while True:",
        "    try:",
        "        while True:",
        "            pass",
        "    except BaseException:",
        "        pass",
    ),
    _attack(
        "ignore the signals of limits",
        "signal = sys.modules['signal']",
        "for number in (14, 15, 24, 26):",
        "    signal.signal(number, signal.SIG_IGN)",
        "while True:",
        "    pass",
    ),
    _attack("fill the memory", "held = []", "while True:", "    held.append(bytearray(1 << 20))"),
    _attack(
        "unpack a bomb",
        "import zlib",
        "return len(zlib.decompress(zlib.compress(bytes(1 << 26)) * 1, bufsize=1 << 40))",
    ),
    _attack(
        "recurse",
        "def down(n):",
        "    return down(n + 1) + 1",
        "sys.setrecursionlimit(10**8)",
        "return down(0)",
    ),
    _attack("answer for ever", "return 'x' * (64 << 20)"),
    _attack("print for ever", "while True:", "    print('x' * 4096)"),
    _attack("ask for ever", "for number in range(10**6):", "    self.clone(f'n{number}')"),
    _attack(
        "multiply", "for _ in range(50):", "    if os.fork() == 0:", "        while True:", "            pass"
    ),
    _attack(
        "fill the disk",
        "fd = os.open(scene['folder'] + '/fill', os.O_CREAT | os.O_WRONLY)",
        "os.write(fd, bytes(64 << 20))",
    ),
    _attack("stop itself", "os.kill(os.getpid(), 19)"),
    _attack("crash the interpreter", "ctypes.string_at(0)"),
    _attack("leave without an answer", "os._exit(0)"),
)
