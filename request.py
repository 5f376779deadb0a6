"""Stream cameras to TorchServe and print its predictions: the program of an edge device.

    camera -> read_frames() -> frame buffers -> send_frames() -> requests in flight -> write_results() -> outputs

read_frames() runs in a reader thread for each camera, send_frames() in a sender thread for each model, write_results()
in the main thread. A request holds one frame, and TorchServe batches the requests; with --client-batching it holds a
JSON batch, for activity recognition a clip. A stream is a camera and a model: each of its frames gets one result.
"""

import logging
import queue
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Event

from tqdm.contrib.logging import logging_redirect_tqdm

from edge.buffer import ReorderBuffer, new_buffer
from edge.cameras import Camera
from edge.changes import ChangeFilter
from edge.check import check
from edge.client import TorchServeClient, open_clients
from edge.clock import Sampler
from edge.errors import EdgeError, SourceError
from edge.frames import Frame, Result, Stream
from edge.options import Options, parse_args
from edge.outputs import JsonLines, Output, Outputs, Progress, Terminal
from edge.process import handle_signals, run_and_leave
from edge.stats import CameraStats, summary
from edge.timing import Timing
from edge.video import Video
from edge.web import serve_page

Stats = dict[Stream, CameraStats]
MAX_RESULTS = 100  # With more waiting results, a slow output slows down everything before it.

log = logging.getLogger("edge")


class Pipeline:
    """What the threads of a run share, and what they do."""

    def __init__(
        self, stats: Stats, clients: list[TorchServeClient], options: Options, stop: Event, timing: Timing
    ) -> None:
        self.cameras = list(dict.fromkeys(stream.camera for stream in stats))
        self.clients = {client.model: client for client in clients}
        self.stats, self.options, self.stop, self.timing = stats, options, stop, timing
        self.filters = {each: ChangeFilter(options.static_percent, self.clients[each.model].info) for each in stats}
        self.buffers = {each.model: new_buffer(self.cameras, each, options.max_age_s, stop, timing) for each in clients}
        self.results: queue.Queue[Result | Future[None]] = queue.Queue(MAX_RESULTS)  # and the ended threads
        self.error: BaseException | None = None
        self.source_code = 0  # the exit code for a source that can't be read

    def read_frames(self, camera: Camera) -> None:
        """Read the frames of a camera into the buffer of each model (reader thread)."""
        samplers = {model: Sampler(client.info.interval_s) for model, client in self.clients.items()}
        try:
            for frame in camera.frames(self.stop):
                for model, sampler in samplers.items():
                    if sampler.is_due(frame.time_s):
                        counts = self.stats[stream := Stream(camera, model)]
                        counts.captured += 1
                        due = replace(frame, model=model, order=counts.captured, small=None)
                        if self.filters[stream].is_unchanged(frame):
                            self.results.put(Result.not_sent(due, "unchanged"))
                        elif dropped := self.buffers[model].put(due):
                            self.results.put(dropped)
        finally:
            for buffer in self.buffers.values():
                buffer.close(camera)

    def send_frames(self, client: TorchServeClient) -> None:
        """Send the frames of a model's buffer without waiting for responses (sender thread)."""
        try:
            while True:
                # First a slot: while frames wait for it in the buffer, the oldest of them can still be dropped.
                client.wait_for_slot()
                if not (frames := self.buffers[client.model].get_batch(client.frames_per_request)):
                    return
                last = frames[-1] if client.info.clip_frames > 1 else None  # A clip is as old as its last frame.
                if wanted := [frame for frame in frames if self.should_send(frame, last or frame)]:
                    client.submit(wanted, self.results.put)
        finally:
            client.drain()

    def should_send(self, frame: Frame, last: Frame) -> bool:
        """Return whether to send a frame; if not, put its result into the queue. last: the frame whose age counts."""
        if self.stop.is_set():
            self.results.put(Result.not_sent(frame, "dropped", "the run ended"))
            return False
        if time.monotonic() - last.captured_at > self.options.max_age_s:
            self.results.put(Result.not_sent(frame, "expired", f"older than {1000 * self.options.max_age_s:g} ms"))
            return False
        return True

    def write_results(self, outputs: Outputs, running: int) -> None:
        """Write the results of each stream in frame order, until all threads have ended (main thread)."""
        reorder_buffers = {stream: ReorderBuffer() for stream in self.stats}
        idle_s = 0.0  # without results, since `stop` was set
        while running and idle_s < self.timing.stop_s:
            try:
                item = self.results.get(timeout=self.timing.poll_s)
            except queue.Empty:
                idle_s += self.timing.poll_s if self.stop.is_set() else 0.0
                outputs.poll()
                continue
            idle_s = 0.0
            if isinstance(item, Future):
                running -= 1
                self.record_error(item.exception())
                continue
            self.filters[stream := item.frame.stream].record(item)
            if item.outcome == "failed" and not stream.camera.is_live:
                self.record_error(self.clients[stream.model].health.error_after(self.options.server_wait_s))
            for result in reorder_buffers[stream].add(outputs.trim(item)):
                if self.stats[stream].record(result) and result.outcome == "failed":
                    log.warning("%s: frame %d failed: %s", stream.name(self.clients), result.frame.number, result.error)
                if result.outcome not in ("dropped", "unchanged"):  # These were not taken from the buffer.
                    self.buffers[stream.model].release(stream.camera)
                outputs.write(result)

    def record_error(self, error: BaseException | None) -> None:
        """Keep the error that run() raises; a source that can't be read is reported, and does not end the run."""
        if isinstance(error, SourceError):
            log.error("%s", error)
            self.source_code = error.exit_code
        elif error:
            self.error = self.error or error
            self.stop.set()

    def run(self, outputs: Outputs) -> int:
        """Stream until all files end or `stop` is set; print the summary and return the exit code. Raises EdgeError."""
        pool = ThreadPoolExecutor(len(self.cameras) + len(self.clients))
        readers = [pool.submit(self.read_frames, camera) for camera in self.cameras]
        threads = [*readers, *(pool.submit(self.send_frames, client) for client in self.clients.values())]
        for thread in threads:
            thread.add_done_callback(self.results.put)
        try:
            self.write_results(outputs, len(threads))
        finally:
            self.stop.set()
            pool.shutdown(wait=False)
            for camera in [camera for camera, reader in zip(self.cameras, readers, strict=True) if not reader.done()]:
                log.warning("the reader of %s hangs and is left behind", camera.name)
            outputs.close()
            print(summary(self.stats), file=sys.stderr)
        if self.error:
            raise self.error
        has_failed = outputs.has_failed or any(counts.outcomes["failed"] for counts in self.stats.values())
        return self.source_code or int(has_failed)


def open_outputs(cameras: list[Camera], page: Output | None, options: Options, stop: Event) -> Outputs:
    """Open the outputs that were asked for. Raises OutputError if one can't be opened."""
    outputs = [page] if page else []
    outputs += [JsonLines(options.jsonl)] if options.jsonl is not None else []
    outputs += [Video(path, camera, options.model) for path, camera in zip(options.video_paths, cameras, strict=False)]
    outputs += [Terminal(options)] if not options.quiet and options.jsonl != "-" else []
    if sys.stderr.isatty() and not options.loop and not any(camera.is_live for camera in cameras):
        outputs.append(Progress(cameras, len(options.model)))
    return Outputs(outputs, stop)


def stream(cameras: list[Camera], options: Options, stop: Event, timing: Timing) -> int:
    """Check the files, wait for the server, and run the pipeline; return the exit code. Raises EdgeError."""
    with open_clients(options, stop, timing) as clients:
        stats = {Stream(camera, client.model): CameraStats() for camera in cameras for client in clients}
        with serve_page(options.http, stats, clients) as page:
            for camera in cameras:
                if options.require_cameras or not camera.is_live:
                    camera.check()
            for client in clients:
                client.wait_until_ready()
            pipeline = Pipeline(stats, clients, options, stop, timing)
            return 0 if stop.is_set() else pipeline.run(open_outputs(cameras, page, options, stop))


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    timing = Timing(stall_s=options.stall_timeout_s)
    stop, interrupted = Event(), Event()
    handle_signals(stop, interrupted)
    settings = (options.fps, options.loop, options.resize, options.jpeg_quality, options.drop, timing)
    cameras = [Camera(name, *settings, compare=options.static_percent > 0) for name in options.input]
    if len({camera.name for camera in cameras}) < len(cameras):
        log.warning("two cameras have the same name: their results look alike")
    try:
        with logging_redirect_tqdm():
            code = (check if options.check else stream)(cameras, options, stop, timing)
    except EdgeError as error:
        print(f"request.py: {error}", file=sys.stderr)
        code = error.exit_code
    return 130 if interrupted.is_set() else code


if __name__ == "__main__":
    run_and_leave(main)
