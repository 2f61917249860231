"""The page for eyes, and the API's own page; nothing on them comes from another host."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles

HERE = Path(__file__).parent.parent
PAGE, SWAGGER = HERE / "page", HERE / "swagger-ui"
OWN_HOST = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; frame-ancestors 'none'; base-uri 'none'"

SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

router = APIRouter(include_in_schema=False)


@router.get("/")
def page() -> FileResponse:
    """To search and look at; its files are under /page."""
    headers = {"Content-Security-Policy": OWN_HOST, "Cache-Control": "no-cache"}
    return FileResponse(PAGE / "index.html", headers=headers)


@router.get("/docs")
def docs() -> HTMLResponse:
    """The API, to read and to try; of scripts in the page that one alone runs which FastAPI has put there."""
    shown = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="tmm-engine",
        swagger_js_url="swagger-ui/swagger-ui-bundle.js",
        swagger_css_url="swagger-ui/swagger-ui.css",
        swagger_favicon_url="swagger-ui/favicon-32x32.png",
        swagger_ui_parameters={"validatorUrl": None},
    )
    digests = [b64encode(sha256(script).digest()).decode() for script in SCRIPT.findall(bytes(shown.body))]
    scripts = " ".join(["script-src 'self'", *(f"'sha256-{digest}'" for digest in digests)])
    shown.headers["Content-Security-Policy"] = f"{OWN_HOST}; {scripts}; style-src 'self' 'unsafe-inline'"
    return shown


def mount(app: FastAPI) -> None:
    """The files of both pages."""
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE))
    app.mount("/swagger-ui", StaticFiles(directory=SWAGGER))
