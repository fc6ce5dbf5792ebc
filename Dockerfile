# An L2D checkpoint behind the OpenAI protocol: the default command is the server, for the checkpoint in /model.
#
#   docker build --tag l2d .                                    NVIDIA GPUs: torch as its default index has it
#   docker build --tag l2d --build-arg TORCH_INDEX=ADDRESS .    CPU: ADDRESS is that of torch's index of CPU builds
#   docker run --rm --publish 8000:8000 --volume "$PWD/demo:/demo:ro" l2d /demo/l2d --budget 15
#   docker run --rm --publish 8000:8000 --gpus all l2d OWNER/NAME --budget 15
#
# What follows the image's name is handed to `python -m l2d serve`.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/cache

RUN useradd --create-home --uid 1000 l2d && mkdir /cache && chown l2d /cache

WORKDIR /opt/l2d
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt --requirement torch.txt
COPY l2d l2d
COPY lm_eval_ext lm_eval_ext
COPY training training
RUN pip install --constraint constraints.txt '.[serve]'

WORKDIR /home/l2d
USER 1000
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "l2d", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
