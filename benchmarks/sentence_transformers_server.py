"""The least a server around sentence-transformers is: FastAPI, one `encode` a request, no batching across requests.

`python -m benchmarks.sentence_transformers_server MODEL_FOLDER PORT`
"""

import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from tasks.models.teacher import load_sentence_transformer


class Body(BaseModel):
    """A body of `POST /v1/embeddings`."""

    input: str | list[str]
    model: str


def create_app(folder: Path) -> FastAPI:
    """The application over the model in `folder`."""
    model = load_sentence_transformer(folder)
    app = FastAPI()

    @app.post("/v1/embeddings")
    def embed(body: Body) -> dict[str, Any]:
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(vectors)]
        return {"object": "list", "data": data, "model": body.model}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
