# lumen-clip on the CPU with ONNX Runtime; models and caches live in the volume.
FROM python:3.12-slim

WORKDIR /app
COPY requirements-edge.txt .
RUN pip install --no-cache-dir -r requirements-edge.txt
COPY *.py LICENSE ./
COPY gen gen

RUN useradd --system lumen && mkdir /data && chown lumen /data
USER lumen
VOLUME /data
ENV LUMEN_DATA_DIR=/data HF_HOME=/data/hub CLIP_BACKEND=onnxrt BIOCLIP_BACKEND=none PYTHONUNBUFFERED=1
EXPOSE 50051
HEALTHCHECK --start-period=10m CMD ["python", "client.py", "health", "--timeout", "5"]
ENTRYPOINT ["python", "lumen_clip.py"]
