"""How the benchmark measures: the two pipelines as processes that take turns, and rows of medians."""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

UNITS = {
    "views": "views/s", "step": "views/s", "end_to_end": "views/s", "knn": "s", "start": "s", "memory": "MiB",
}
RATES = ("views", "step", "end_to_end")
PIPELINES = ("plain", "ours")
EPOCH_VIEWS = 2 * 50_000


class Worker:
    """A pipeline in a process of its own. `start` is the seconds until its first training step was done; `counts`,
    how many batches of what make a measurement, belongs to whoever measures."""

    def __init__(self, pipeline, settings, **environment):
        self.pipeline, self.counts = pipeline, {}
        self.errors = tempfile.TemporaryFile("w+")
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{pipeline}", json.dumps(settings)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env={**os.environ, **environment},
        )
        self.answer()
        self.start = time.perf_counter() - begin

    def call(self, name, *arguments):
        with contextlib.suppress(BrokenPipeError):  # it has ended; answer says why
            self.process.stdin.write(json.dumps([name, arguments]) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = self.errors.read().strip().splitlines()[-1:]
            raise RuntimeError(f"the {self.pipeline} pipeline ended: {' '.join(last) or self.process.wait()}")
        return json.loads(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Benchmark:
    """The measurements of one width and batch size; `keep` takes each row of the results as it comes."""

    def __init__(self, settings, rounds, seconds, bar, keep):
        self.settings, self.rounds, self.seconds, self.bar, self.keep = settings, rounds, seconds, bar, keep

    def add(self, what, pipeline, values, **extra):
        row = {
            "what": what, "pipeline": pipeline, "width": self.settings["width"], "batch": self.settings["batch"],
            "unit": UNITS[what], "median": statistics.median(values), "low": min(values), "high": max(values),
            "runs": len(values), **extra,
        }
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        self.keep(row)
        return row

    def launch(self, pipeline, changed=(), **environment):
        switches = {name: value != (name in changed) for name, value in self.settings["switches"].items()}
        self.bar.set_description(f"{pipeline} starts")
        self.bar.update()
        return Worker(pipeline, {**self.settings, "switches": switches}, **environment)

    def measure(self, worker, what, count=None):
        self.bar.set_description(f"{worker.pipeline} {what}")
        self.bar.update()
        return worker.call(what, *([] if count is None else [count]))

    def start(self):
        """Both pipelines, running. With compilation the first start is not counted: it fills the cache of kernels."""
        values, workers = {name: [] for name in PIPELINES}, {}
        uncounted = int(self.settings["switches"]["compile"])
        for _ in range(uncounted + self.rounds):
            for name in PIPELINES:
                if name in workers:
                    workers[name].close()
                workers[name] = self.launch(name)
                values[name].append(workers[name].start)
        for name in PIPELINES:
            self.add("start", name, values[name][uncounted:])
        return workers

    def calibrate(self, worker, what):
        """How many batches take about self.seconds. The first call compiles what there is to compile."""
        if what not in worker.counts:
            if self.settings["device"] != "cpu":
                self.measure(worker, what, 2)
            count = 1
            while (seconds := self.measure(worker, what, count)) < self.seconds / 4:
                count *= 4
            worker.counts[what] = max(1, round(count * self.seconds / seconds))
        return worker.counts[what]

    def rates(self, workers, whats, extra):
        """Take turns; workers is {name: Worker}, extra {name: what its rows have besides}. Returns the medians by name
        and what."""
        counts = {(name, what): self.calibrate(worker, what) for name, worker in workers.items() for what in whats}
        values = {key: [] for key in counts}
        for i in range(self.rounds):
            for what in whats:
                for name in list(workers)[::1 if i % 2 else -1]:
                    count = counts[name, what]
                    seconds = self.measure(workers[name], what, count)
                    values[name, what].append(2 * self.settings["batch"] * count / seconds)
        return {
            (name, what): self.add(what, workers[name].pipeline, rates, **extra[name])["median"]
            for (name, what), rates in values.items()
        }

    def compare(self, whats, cores):
        """Both pipelines, taking turns."""
        if "memory" in whats:
            self.measure_memory()
        whats = [what for what in whats if what != "memory"]
        if not whats:
            return
        workers = self.start() if "start" in whats else {name: self.launch(name) for name in PIPELINES}
        rates = [what for what in RATES if what in whats]
        if rates:
            self.choose_workers(workers["plain"], [what for what in rates if what != "step"], cores)
            medians = self.rates(workers, rates, dict.fromkeys(PIPELINES, {}))
            if "step" in rates and self.settings["device"] != "cpu":
                print_limits(self.settings, workers["ours"].call("limits"), medians["ours", "step"])
        if "knn" in whats:
            values = {name: [] for name in PIPELINES}
            for _ in range(self.rounds):
                for name in PIPELINES:
                    values[name].append(self.measure(workers[name], "knn"))
            for name in PIPELINES:
                self.add("knn", name, values[name])
        for worker in workers.values():
            worker.close()

    def measure_memory(self):
        """Each pipeline in a process that has done nothing else, one after the other: both at once may not fit."""
        for name in PIPELINES:
            worker = self.launch(name)
            self.add("memory", name, [self.measure(worker, "memory")])
            worker.close()

    def choose_workers(self, worker, whats, cores):
        """Let the plain pipeline find out how many loader workers help."""
        candidates = sorted({0, 1, cores} if cores <= 4 else {0, cores // 2, cores - 1, cores})
        for what in whats:
            self.bar.set_description("plain chooses its workers")
            rates = worker.call("choose_workers", what, candidates, 2 if self.settings["device"] == "cpu" else 10)
            listed = ", ".join(f"{rate:,.0f} with {number}" for number, rate in zip(candidates, rates))
            tqdm.write(f"plain {what}, views/s by the number of loader workers: {listed}")

    def turn_switches(self, names):
        """Ours with each switch turned, taking turns with ours as it is."""
        ours = self.launch("ours")
        for name in names:
            turned = self.launch("ours", [name])
            text = f"{name} {'off' if self.settings['switches'][name] else 'on'}"
            whats = ["end_to_end"] if name in ("resident", "batched") else ["step", "end_to_end"]
            extra = {"ours": {"switch": f"beside {text}"}, "turned": {"switch": text}}
            medians = self.rates({"ours": ours, "turned": turned}, whats, extra)
            turned.close()
            for what in whats:
                other, base = medians["turned", what], medians["ours", what]
                tqdm.write(f"{text}: {what} {other:,.0f} views/s, as it is {base:,.0f}: {other / base:.3f} times")
        ours.close()
        if "compile" in names:
            self.start_with_compilation()

    def start_with_compilation(self):
        """The start without compilation, with it, and with the kernels of an earlier start."""
        compiles = self.settings["switches"]["compile"]
        with tempfile.TemporaryDirectory() as cache:
            for text, on in (("compile on, empty cache", True), ("compile on, filled cache", True), ("compile off", False)):
                worker = self.launch("ours", [] if on == compiles else ["compile"], TORCHINDUCTOR_CACHE_DIR=cache)
                self.add("start", "ours", [worker.start], switch=text)
                tqdm.write(f"{text}: start {worker.start:.1f} s")
                worker.close()


def print_limits(settings, limits, rate):
    """What the step reaches of what a GPU can do. Not on CPUs: their matrix product is another library's than their
    convolution, and no bound of it."""
    flops = rate * limits["flop_per_view"]
    tqdm.write(
        f"step at width {settings['width']}, batch {settings['batch']}: {flops / 1e12:.3g} TFLOP/s, "
        f"{100 * flops / limits['flops']:.1f} % of the measured {limits['precision']} matrix product "
        f"({limits['flops'] / 1e12:.4g} TFLOP/s); copies {limits['bandwidth'] / 1e9:,.0f} GB/s"
    )
    floor = limits["floor_per_view"]
    tqdm.write(
        f"floor: {1 / floor:,.0f} views/s, {EPOCH_VIEWS * floor:.2f} s an epoch of CIFAR-10; "
        f"the step takes {1 / (rate * floor):.2f} times that, {EPOCH_VIEWS / rate:.2f} s"
    )
