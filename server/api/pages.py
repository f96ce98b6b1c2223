"""What people see in a browser: the first page, and the API's documentation, without anything from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from jinja2 import Environment, FileSystemLoader
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from lowssl_core import __version__
from server.api.service import Service

router = APIRouter(include_in_schema=False)

_PAGES = Path(__file__).parents[1] / "pages"
_STATIC = "/static"
# The browser itself sees to it that nothing is loaded from other hosts.
_POLICY = "default-src 'none'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; "
_PAGE_HEADERS = {"Content-Security-Policy": _POLICY + "style-src 'unsafe-inline'", "Cache-Control": "no-store"}
_DOCS_HEADERS = {
    "Content-Security-Policy": _POLICY + "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'"
}


def mount_static_files(app: FastAPI) -> None:
    """Serve Swagger UI's files, which the package fastapi-offline brings."""
    app.mount(_STATIC, StaticFiles(packages=[("fastapi_offline", "static")]), name="static")


@router.get("/")
async def index(request: Request) -> HTMLResponse:
    """What serves, and how to call it."""
    service = Service.of(request)
    template = Environment(loader=FileSystemLoader(_PAGES), autoescape=True).get_template("index.html")
    page = template.render(
        status=service.engine.status,
        limits=service.limits,
        how_to_import=service.how_to_import,
        how_to_promote=service.how_to_promote,
        needs_keys=service.settings.needs_keys,
        url=str(request.base_url).rstrip("/"),
        lowssl=__version__,
    )
    return HTMLResponse(page, headers=_PAGE_HEADERS)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Swagger UI."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="LowSSL API",
        swagger_js_url=f"{_STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{_STATIC}/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None, "defaultModelsExpandDepth": 0, "tryItOutEnabled": True},
    )
    return HTMLResponse(page.body, headers=_DOCS_HEADERS)
