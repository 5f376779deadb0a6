"""Stream cameras to TorchServe and print its predictions: the program of an edge device.

    camera -> read_frames() -> frame buffer -> send_frames() -> requests in flight -> write_results() -> outputs

read_frames() runs in a reader thread for each camera, send_frames() in the sender thread, write_results() in the main
thread. A request holds one frame, and TorchServe batches the requests; with --client-batching it holds a JSON batch.
Every captured frame gets one result: answered, failed, dropped or expired. Predictions go to standard output, all else
to standard error. `request.py --help` lists the exit codes.
"""

import logging
import queue
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from tqdm.contrib.logging import logging_redirect_tqdm

from edge.buffer import FrameBuffer, ReorderBuffer
from edge.cameras import Camera
from edge.check import check
from edge.client import TorchServeClient
from edge.errors import EdgeError, ServerError, SourceError
from edge.frames import Frame, Result
from edge.metrics import serve_metrics
from edge.options import Options, parse_args
from edge.outputs import JsonLines, Output, Outputs, Progress, Terminal
from edge.process import handle_signals, run_and_leave
from edge.stats import CameraStats, summary
from edge.timing import Timing
from edge.video import Video

MAX_WAITING_FRAMES = 4  # of each camera, at least a JSON batch: enough for a short delay, and they are still fresh
MAX_RESULTS = 100  # With more waiting results, a slow output slows down everything before it.
REORDER_WINDOW = 4  # A camera may be ahead of its oldest missing result by so many times the frames in flight.

log = logging.getLogger("edge")


class Pipeline:
    """What the threads of a run share, and what they do."""

    def __init__(
        self, cameras: list[Camera], client: TorchServeClient, options: Options, stop: threading.Event, timing: Timing
    ) -> None:
        self.stats = {camera: CameraStats() for camera in cameras}
        self.client, self.options, self.stop, self.timing = client, options, stop, timing
        window = REORDER_WINDOW * options.max_in_flight * options.frames_per_request
        timing = replace(timing, batch_wait_s=min(timing.batch_wait_s, options.max_age_s / 2))
        self.buffer = FrameBuffer(max(MAX_WAITING_FRAMES, options.frames_per_request), cameras, window, stop, timing)
        self.results: queue.Queue[Result | Future[None]] = queue.Queue(MAX_RESULTS)  # and the ended threads
        self.error: BaseException | None = None
        self.source_code = 0  # the exit code for a source that can't be read

    def read_frames(self, camera: Camera) -> None:
        """Read the frames of a camera into the buffer (reader thread)."""
        try:
            for frame in camera.frames(self.stop):
                self.stats[camera].captured += 1
                if dropped := (self.buffer.put(frame) if frame.jpeg else frame):
                    reason = "the run ended" if self.stop.is_set() else "buffer full" if frame.jpeg else "read too late"
                    self.results.put(Result.not_sent(dropped, "dropped", reason))
        finally:
            self.buffer.close(camera)

    def send_frames(self) -> None:
        """Send the frames of the buffer without waiting for responses (sender thread)."""
        try:
            while True:
                # First a slot: while frames wait for it in the buffer, the oldest of them can still be dropped.
                self.client.wait_for_slot()
                frames = self.buffer.get_batch(self.options.frames_per_request)
                if not frames:
                    return
                if wanted := [frame for frame in frames if self.should_send(frame)]:
                    self.client.submit(wanted, self.results.put)
        finally:
            self.client.drain()

    def should_send(self, frame: Frame) -> bool:
        """Whether a frame is still to be sent. Otherwise put its result into the queue."""
        if self.stop.is_set():
            self.results.put(Result.not_sent(frame, "dropped", "the run ended"))
            return False
        if time.monotonic() - frame.captured_at > self.options.max_age_s:
            self.results.put(Result.not_sent(frame, "expired", f"older than {1000 * self.options.max_age_s:g} ms"))
            return False
        return True

    def write_results(self, outputs: Outputs, running: int) -> None:
        """Write the results of each camera in frame order, until all threads have ended (main thread)."""
        reorder_buffers = {camera: ReorderBuffer() for camera in self.stats}
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
            self.check_server(item)
            camera = item.frame.camera
            for result in reorder_buffers[camera].add(item if self.options.save_video else item.without_image()):
                if self.stats[camera].record(result) and result.outcome == "failed":
                    log.warning("%s: frame %d failed: %s", camera.name, result.frame.number, result.error)
                if result.outcome != "dropped":  # A dropped frame was not taken from the buffer.
                    self.buffer.release(camera)
                outputs.write(result)

    def check_server(self, result: Result) -> None:
        """End the run if a frame of a file failed and the server did not respond for --server-wait."""
        health, wait_s = self.client.health, self.options.server_wait_s
        if result.outcome == "failed" and not result.frame.camera.is_live and 0 < health.down_for_s() >= wait_s:
            text = f"{self.options.url} did not respond for {wait_s:g} s ({health.last_error}): see the server's logs"
            self.record_error(ServerError(text))

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
        pool = ThreadPoolExecutor(len(self.stats) + 1)
        readers = [pool.submit(self.read_frames, camera) for camera in self.stats]
        threads = [*readers, pool.submit(self.send_frames)]
        for thread in threads:
            thread.add_done_callback(self.results.put)
        try:
            self.write_results(outputs, len(threads))
        finally:
            self.stop.set()
            pool.shutdown(wait=False)
            for camera, reader in zip(self.stats, readers, strict=True):
                if not reader.done():
                    log.warning("the reader of %s hangs and is left behind", camera.name)
            outputs.close()
            print(summary(self.stats), file=sys.stderr)
        if self.error:
            raise self.error
        has_failed = outputs.has_failed or any(counts.outcomes["failed"] for counts in self.stats.values())
        return self.source_code or int(has_failed)


def open_outputs(cameras: list[Camera], options: Options, stop: threading.Event) -> Outputs:
    """Open the outputs that were asked for. Raises OutputError if one can't be opened."""
    outputs: list[Output] = []
    if options.jsonl is not None:
        outputs.append(JsonLines(options.jsonl))
    outputs += [Video(path, camera) for path, camera in zip(options.video_paths, cameras, strict=False)]
    if not options.quiet and options.jsonl != "-":
        outputs.append(Terminal(options.batch_size, options.client_batching, options.log_every, len(cameras) > 1))
    if sys.stderr.isatty() and not options.loop and not any(camera.is_live for camera in cameras):
        outputs.append(Progress(cameras))
    return Outputs(outputs, stop)


def stream(cameras: list[Camera], options: Options, stop: threading.Event, timing: Timing) -> int:
    """Check the files, wait for the server, and run the pipeline; return the exit code. Raises EdgeError."""
    with TorchServeClient(options, stop, timing) as client:
        pipeline = Pipeline(cameras, client, options, stop, timing)
        with serve_metrics(options.metrics_port, pipeline.stats):
            for camera in cameras:
                if options.require_cameras or not camera.is_live:
                    camera.check()
            client.wait_until_ready()
            return 0 if stop.is_set() else pipeline.run(open_outputs(cameras, options, stop))


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    timing = Timing(stall_s=options.stall_timeout_s)
    stop, interrupted = threading.Event(), threading.Event()
    handle_signals(stop, interrupted)
    settings = (options.fps, options.loop, options.resize, options.jpeg_quality, options.drop, timing)
    cameras = [Camera(name, *settings) for name in options.input]
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
