"""The chat page: static files that the server sends from the package, and their routes.

`index.html` loads `style.css`, the modules in `app`, and the libraries in `vendor`, which `vendor/manifest.json` lists
with their version, license and hash. There is no build step: browsers load the files as they are.
"""
