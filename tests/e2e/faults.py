"""What the fault tests share: starting pmpd_faulty (tests/faults/fault.h explains PMPD_FAULT), reading a
journal without the program's help, comparing run files dataset by dataset, finding processes left over."""
import dataclasses
import fnmatch
import os
import pathlib
import struct
import subprocess
import time

import h5py
import numpy as np

from common import BUILD, PMPD, TINY, TOP, Case, environment, pmpd, write_config

FAULTY = str(BUILD / "tests" / "pmpd_faulty")
PROMPTS = TOP / "experiments" / "tasks" / "tiny_mixed.jsonl"
DONE, ERROR, USER_ERROR, DIED, STOPPED = 0, 1, 2, 69, 75  # exit codes

# ---- starting ----


@dataclasses.dataclass
class Start:
    """One start of the program that has ended."""
    code: int        # of mpirun where there is one
    out: str
    err: str
    faults: list     # [rank, point, call, action] of every fault that happened
    began: list      # (rank, ordinal) of every prompt put into a slot
    seconds: float


class Running:
    """One start of the program. fault, idle: PMPD_FAULT, PMPD_FAULT_IDLE; ranks: 0 without mpirun; others: words before
    the program on other ranks than 0; mpirun: words instead of "mpirun"; extra: environment."""

    def __init__(self, config, *args, fault=None, ranks=0, idle=None, others=(), mpirun=("mpirun",), **extra):
        self.config = str(config)
        self.log = pathlib.Path(f"{config}.log")
        self.log.unlink(missing_ok=True)
        env = environment()
        env.update(PMPD_FAULT_LOG=str(self.log))
        if fault and ranks:  # what killed ranks and mpiruns leave lying about lies in the test's folder
            env.update(dict.fromkeys(("TMPDIR", "OMPI_MCA_btl_vader_backing_directory"), str(self.log.parent)))
        env.update(extra)
        for name, value in (("PMPD_FAULT", fault), ("PMPD_FAULT_IDLE", idle)):
            env.pop(name, None)
            if value is not None:
                env[name] = str(value)
        command = [FAULTY if fault else PMPD, "run", self.config, *map(str, args)]
        if others:
            command = [*mpirun, "-n", "1", *command, ":", "-n", str(ranks - 1), *others, *command]
        elif ranks:
            command = [*mpirun, "-n", str(ranks), *command]
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)

    def lines(self):
        try:
            return [line.split() for line in self.log.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def end(self, timeout=120):
        """Waits; a start that lasts longer is killed and fails the test."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_left_over(self.config)
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"still running after {timeout} s\n{err.decode(errors='replace')}") from None
        lines = self.lines()
        return Start(self.process.returncode, out.decode(errors="replace"), err.decode(errors="replace"),
                     [[int(l[1]), l[2], int(l[3]), l[4]] for l in lines if l[0] == "fault"],
                     [(int(l[1]), int(l[2])) for l in lines if l[0] == "start"], time.monotonic() - self.began_s)


def start(config, *args, timeout=120, **options):
    return Running(config, *args, **options).end(timeout)


def left_over(marker):
    """Processes whose command line names `marker` (a run's configuration)."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(marker).encode() in words and not dead:
                found.append(int(entry.name))
    return found


def kill_left_over(marker):
    for pid in left_over(marker):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass


# ---- journals ----

KINDS = {1: "run", 2: "start", 3: "finished", 4: "failed", 5: "state", 6: "fault", 7: "end", 8: "retry"}
HEAD = struct.Struct("<4sIII")
CRC_TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82f63b78 if byte & 1 else 0)
    CRC_TABLE.append(byte)


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xffffffff


def text_of(payload):
    return payload.split(b"\0")[0].decode()


def decode(kind, payload):
    """The fields of a record that the tests look at."""
    if kind == "run":
        return {"epoch": struct.unpack_from("<i", payload)[0]}
    if kind == "start":
        ordinal, attempt, epoch, replica = struct.unpack("<q16x3i", payload)
        return {"ordinal": ordinal, "attempt": attempt, "epoch": epoch, "replica": replica}
    if kind == "finished":
        return {"ordinal": struct.unpack_from("<4xq", payload)[0]}
    if kind == "failed":
        ordinal, attempts = struct.unpack_from("<q16xi", payload)
        return {"ordinal": ordinal, "attempts": attempts, "reason": text_of(payload[28:])}
    if kind == "fault":
        ordinal, epoch, rank, n_company, signal = struct.unpack_from("<q16x4i", payload)
        return {"ordinal": ordinal, "epoch": epoch, "rank": rank, "n_company": n_company, "signal": signal,
                "reason": text_of(payload[40:])}
    if kind == "end":
        epoch, how = struct.unpack_from("<2i", payload)
        return {"epoch": epoch, "how": ("done", "stopped", "error")[how], "reason": text_of(payload[16:])}
    if kind == "state":
        lease, ordinal, dial, target, offset, slope, account = struct.unpack("<2q16xf4d", payload)
        return {"lease": lease, "ordinal": ordinal, "dial": dial, "target": target, "offset": offset, "slope": slope,
                "account": account}
    return {}


def read_journal(directory):
    """[(kind, fields)] of the whole records, and the number of bytes behind them."""
    path, at, records = pathlib.Path(directory) / "journal.bin", 0, []
    data = path.read_bytes() if path.exists() else b""
    while at + HEAD.size <= len(data):
        magic, kind, length, crc = HEAD.unpack_from(data, at)
        end = at + HEAD.size + length
        if magic != b"PMJ1" or end > len(data) or crc32c(data[at + 4:at + 12] + data[at + 16:end]) != crc:
            break
        records.append((KINDS[kind], decode(KINDS[kind], data[at + HEAD.size:end])))
        at = end
    return records, len(data) - at


def records_of(directory, kind):
    return [fields for k, fields in read_journal(directory)[0] if k == kind]


def wasted_work(directory):
    """What a journal must not show: prompts begun again after they were finished, or finished twice."""
    finished, wrong = set(), []
    for kind, fields in read_journal(directory)[0]:
        ordinal = fields.get("ordinal")
        if kind in ("start", "finished") and ordinal in finished:
            wrong.append(f"prompt {ordinal}: {kind} after it was finished")
        if kind == "finished":
            finished.add(ordinal)
    return wrong


# ---- run files ----

# What two runs that did the same work may differ in, and why. "PATH@NAME": an attribute; "PATH:COLUMN": a column
# of a table. Everything else is compared bit for bit; tables after sorting their rows.
DROPPED = [
    ("/provenance@written_utc", "when the file was written"),
    ("/provenance@starts", "how often the program was started"),
    ("/prompts:attempt", "how often the prompt was begun"),
    ("/prompts:epoch", "in which start it was finished"),
    ("/prompts:replica", "who finished it"),
    ("/prompts:started_unix_s", "time"), ("/prompts:wall_s", "time"),
    ("/prompts:prefill_s", "time"), ("/prompts:decode_s", "time"),
    ("/steps:pass", "a row of /passes, which come in another order"),
    ("/passes:pass", "counts the passes of one start and replica"),
    ("/passes:epoch", "which start"), ("/passes:replica", "who"),
    ("/passes:time_us", "time"), ("/passes:comm_us", "time"),
    ("/decisions:latency_us", "time"),
    ("/metrics/decode_tok_s", "time"), ("/metrics/decode_s", "time"), ("/metrics/prefill_s", "time"),
]
# With several slots, who shares a pass depends on when prompts came in, so passes are other ones.
DROPPED_SLOTS = DROPPED + [
    ("/passes", "other company, other passes"), ("/metrics/n_passes", "other passes"),
    ("/metrics/bytes_per_token", "a pass reads the weights once for all that share it"),
]
# When the starts of one run directory used other numbers of ranks.
DROPPED_WORLDS = [
    ("/provenance@world_size", "of the last start"), ("/provenance@replicas", "of the last start"),
    ("/provenance@tensor_ranks", "of the last start"),
]
# When one of the runs gave a prompt up, whose rows are left out.
DROPPED_FAILED = [
    ("/metrics/*", "sums and means over the prompts that were finished"),
    ("/plans:first_switch", "a row of /plan_switches"), ("/passes", "there are those of attempts at the prompt"),
]


def is_dropped(name, dropped):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in dropped)


def plain(value):
    """A value that == compares bit for bit; any NaN is "nan", which equals itself."""
    if isinstance(value, np.ndarray) and value.dtype.names:
        return tuple(plain(row) for row in value)
    if isinstance(value, np.void):
        return tuple(plain(value[name]) for name in value.dtype.names)
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes() if value.dtype != object else tuple(map(plain, value.flat)))
    value = value.item() if isinstance(value, np.generic) else value
    return "nan" if isinstance(value, float) and value != value else value


def contents(path, dropped, without=None):
    """{name: value} of everything in a run file; tables as sorted rows without the dropped columns, and without the
    rows of the prompt `without`."""
    out = {}

    def attributes(name, thing):
        for key, value in thing.attrs.items():
            if not is_dropped(f"{name}@{key}", dropped):
                out[f"{name}@{key}"] = plain(value)

    def visit(name, thing):
        name = "/" + name
        if is_dropped(name, dropped):
            return
        attributes(name, thing)
        if isinstance(thing, h5py.Group):
            return
        value = thing[()]
        if thing.dtype.names:
            kept = [c for c in thing.dtype.names if not is_dropped(f"{name}:{c}", dropped)]
            if without is not None and "prompt" in kept:
                value = value[value["prompt"] != without]
            out[name] = [kept] + sorted(tuple(plain(row[c]) for c in kept) for row in value)
        elif isinstance(value, bytes):  # a text: the configuration, which names the run directory
            text = value.decode().replace(str(pathlib.Path(path).parent), "DIR")
            tensor = is_dropped("/provenance@tensor_ranks", dropped)
            out[name] = [s for s in text.splitlines() if not (tensor and s.strip().startswith("tensor_ranks"))]
        else:
            out[name] = plain(value)

    with h5py.File(path, "r") as file:
        attributes("/", file)
        file.visititems(visit)
    return out


def differences(directory, whole, dropped, without=None):
    """What the run files of two run directories differ in."""
    a, b = (contents(pathlib.Path(d) / "run.h5", dropped, without) for d in (directory, whole))
    wrong = [f"only in one of them: {name}" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        if a[name] != b[name]:
            wrong.append(f"{name}: {str(a[name])[:300]} instead of {str(b[name])[:300]}")
    return wrong


def dangling_passes(directory):
    """Steps whose pass is no decode pass, or one with fewer tokens than point to it."""
    with h5py.File(pathlib.Path(directory) / "run.h5", "r") as run:
        passes, at = run["passes"][:], run["steps"]["pass"]
        if len(at) and int(at.max()) >= len(passes):
            return ["a pass out of range"]
        n = np.bincount(at, minlength=len(passes))
        return [f"row {i} of /passes" for i in np.flatnonzero((n > passes["n_tok"]) | ((n > 0) & (passes["kind"] != 1)))]


# ---- tests ----


class FaultCase(Case):
    """Run directories in a temporary folder, each with a configuration of its own."""
    n_prompts = 10

    def config(self, name, **more):
        settings = {"model__path": TINY, "prompts__path": PROMPTS, "prompts__limit": self.n_prompts,
                    "decode__max_new_tokens": 24, "decode__stop_at_eos": False, "decode__slots": 1,
                    "backend__threads": 1, "output__dir": self.folder / name, "run__max_deaths": 0}
        settings.update(more)
        path = self.folder / f"{name}.cfg"
        write_config(path, **settings)
        return path

    def check_gone(self, config, limit_s=30):
        """No process of the run stays."""
        until = time.monotonic() + limit_s
        while left_over(config) and time.monotonic() < until:
            time.sleep(0.05)
        self.assertEqual(left_over(config), [], "processes left over")

    def nested(self):
        """A nested model and a plan over its levels, as settings."""
        folder = self.folder / "nested"
        if not folder.exists():
            pmpd("quantize", TINY, folder)
        return {"model__path": folder, "policy__name": "static", "policy__prefill": "4",
                "policy__switches": "0:4 5:3 12:2"}

    def check_whole(self, name, whole, dropped, failed=None):
        """A finished run directory: nothing lost, nothing done twice, nothing lying about. failed: the prompt that was
        given up."""
        directory = self.folder / name
        records, n_bad = read_journal(directory)
        self.assertEqual(n_bad, 0, "bytes behind the last record of the journal")
        self.assertEqual(wasted_work(directory), [])
        finished = sorted(f["ordinal"] for k, f in records if k == "finished")
        self.assertEqual(finished, [i for i in range(self.n_prompts) if i != failed])
        self.assertEqual(sorted(p.name for p in directory.iterdir()), ["answers.jsonl", "journal.bin", "run.h5"])
        self.assertEqual(differences(directory, self.folder / whole, dropped, failed), [])
        self.assertEqual(dangling_passes(directory), [])
        self.assertEqual(len((directory / "answers.jsonl").read_text().splitlines()), len(finished))
