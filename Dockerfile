# An image for scripts/kubernetes.yaml: the repository with its .venv in /app.  docker build -t your-image .
FROM python:3.11
WORKDIR /app
# The environment first: it is built again only when the requirements change.
COPY requirements.txt ./
COPY scripts/setup_environment.sh scripts/
RUN bash scripts/setup_environment.sh
COPY . .
ENV PATH=/app/.venv/bin:$PATH
CMD ["bash", "run_all.sh", "--offline"]
