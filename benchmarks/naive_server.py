"""The endpoint that one writes first, FastAPI, Pillow and ONNX Runtime: what `/embed` is measured against."""

import argparse
import io
from collections.abc import Sequence

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image


def create_app(path: str) -> FastAPI:
    """An app that embeds one uploaded image with the ONNX file at `path`; everything as the tutorials have it."""
    session = onnxruntime.InferenceSession(path)
    size = session.get_inputs()[0].shape[1]
    resize = int(session.get_modelmeta().custom_metadata_map["resize"])
    app = FastAPI()

    @app.post("/embed")
    def embed(file: UploadFile) -> dict[str, list[float]]:
        image = Image.open(io.BytesIO(file.file.read())).convert("RGB")
        scale = resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        embedding = session.run(["embedding"], {"images": pixels[None]})[0]
        return {"embedding": embedding[0].tolist()}

    return app


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="an .onnx file that lowssl export made")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(argv)
    uvicorn.run(create_app(options.model), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
