"""An RTSP camera for the tests, whose frames show when they were made. It runs in the system's Python, with GStreamer.

The first two rows of cells hold time.monotonic() in milliseconds, a bit a cell: white is 1. It writes its port to
standard output when it is ready.
"""

import argparse
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

WIDTH, HEIGHT, CELL = 320, 240, 16
ENCODERS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! video/x-h264,profile=baseline ! "
    "h264parse ! rtph264pay name=pay0 config-interval=1",
    "b-frames": "x264enc speed-preset=ultrafast bframes=2 b-adapt=false key-int-max=25 rc-lookahead=0 "
    "sync-lookahead=0 ! video/x-h264,profile=main ! h264parse ! rtph264pay name=pay0 config-interval=1",
    "mjpeg": "jpegenc ! rtpjpegpay name=pay0",
}


def picture() -> bytes:
    """Return a frame in the format I420."""
    now = int(time.monotonic() * 1000) & 0xFFFFFFFF
    rows = []
    for first in (0, 16):
        cells = [(b"\xeb" if now >> bit & 1 else b"\x10") * CELL for bit in range(first, first + 16)]
        rows.append(b"".join(cells).ljust(WIDTH, b"\x80") * CELL)
    return b"".join(rows).ljust(WIDTH * HEIGHT, b"\x40") + b"\x80" * (WIDTH * HEIGHT // 2)


class Camera(GstRtspServer.RTSPMediaFactory):  # type: ignore[misc]
    def __init__(self, fps: int, encoder: str) -> None:
        super().__init__()
        self.fps, self.encoder = fps, encoder
        self.set_shared(True)

    def do_create_element(self, _url: object) -> object:
        caps = f"video/x-raw,format=I420,width={WIDTH},height={HEIGHT},framerate={self.fps}/1"
        source = f"appsrc name=source is-live=true format=time do-timestamp=true caps={caps}"
        return Gst.parse_launch(f"( {source} ! {ENCODERS[self.encoder]} )")

    def do_configure(self, media: object) -> None:
        source = media.get_element().get_child_by_name("source")  # type: ignore[attr-defined]

        def push() -> bool:
            return bool(source.emit("push-buffer", Gst.Buffer.new_wrapped(picture())) == Gst.FlowReturn.OK)

        GLib.timeout_add(1000 // self.fps, push)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", default="0")
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--encoder", choices=ENCODERS, default="h264")
    parser.add_argument("--login", metavar="USER:PASSWORD", help="ask for it with digest authentication")
    args = parser.parse_args()
    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=args.port)
    camera = Camera(args.fps, args.encoder)
    if args.login:
        user, _, password = args.login.partition(":")
        token = GstRtspServer.RTSPToken()
        token.set_string("media.factory.role", "user")
        auth = GstRtspServer.RTSPAuth()
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(user, password, token)
        server.set_auth(auth)
        role = Gst.Structure.from_string("user, media.factory.access=true, media.factory.construct=true")[0]
        camera.add_role_from_structure(role)
    server.get_mount_points().add_factory("/live", camera)
    server.attach(None)
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
