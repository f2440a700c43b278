"""What the manifests may say: the fields that ours use, strictly, as in KubeRay's CRDs 1.6 and 1.7 and Kubernetes 1.32.

Unknown fields are refused, as `kubectl apply` refuses them; a field that is new to our manifests is added here, too.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "integer", "minimum": 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}  # Kubernetes refuses a bare number or truth value
NAME: Schema = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY: Schema = {"anyOf": [COUNT, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[KMGT]i?)?$"}]}


def table(*required: str, **fields: Schema) -> Schema:
    """An object of these fields and no others; `required` ones have to be there."""
    assert set(required) <= set(fields)
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def rows(item: Schema, at_least: int = 1) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


META = table("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = table("requests", "limits", requests=QUANTITIES, limits=QUANTITIES)
SELECTOR = table("matchLabels", matchLabels=TEXTS)
CONTAINER_SECURITY = table(
    allowPrivilegeEscalation=FLAG, readOnlyRootFilesystem=FLAG, capabilities=table("drop", drop=rows(TEXT))
)
POD_SECURITY = table(
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    runAsGroup=COUNT,
    fsGroup=COUNT,
    seccompProfile=table("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
)
EXEC = table("command", command=rows(TEXT))
PROBE = {
    **table(
        exec=EXEC,
        httpGet=table("port", path=TEXT, port=PORT),
        periodSeconds=SECONDS,
        timeoutSeconds=SECONDS,
        failureThreshold=SECONDS,
    ),
    "oneOf": [{"required": ["exec"]}, {"required": ["httpGet"]}],
}
ENVIRONMENT = table(
    "name",
    name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    value=TEXT,
    valueFrom=table("secretKeyRef", secretKeyRef=table("name", "key", name=NAME, key=TEXT)),
)
CONTAINER = table(
    "name",
    "image",
    "resources",
    name=NAME,
    image=TEXT,
    env=rows(ENVIRONMENT),
    lifecycle=table("preStop", preStop=table("exec", exec=EXEC)),
    livenessProbe=PROBE,
    ports=rows(table("containerPort", name=NAME, containerPort=PORT)),
    readinessProbe=PROBE,
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    startupProbe=PROBE,
    volumeMounts=rows(table("name", "mountPath", name=NAME, mountPath=TEXT)),
)
TERM = table(
    "matchExpressions",
    matchExpressions=rows(
        table("key", "operator", key=TEXT, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"), values=rows(TEXT))
    ),
)
AFFINITY = table(
    "nodeAffinity",
    nodeAffinity=table(
        requiredDuringSchedulingIgnoredDuringExecution=table("nodeSelectorTerms", nodeSelectorTerms=rows(TERM))
    ),
)
POD = table(
    "containers",
    affinity=AFFINITY,
    automountServiceAccountToken=FLAG,
    containers=rows(CONTAINER),
    restartPolicy=one_of("Never"),  # KubeRay refuses another one under autoscaler v2
    securityContext=POD_SECURITY,
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
    tolerations=rows(
        table(
            key=TEXT,
            operator=one_of("Exists", "Equal"),
            value=TEXT,
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    volumes=rows(
        table("name", "emptyDir", name=NAME, emptyDir=table(medium=one_of("Memory"), sizeLimit=QUANTITY)),
    ),
)
TEMPLATE = table("spec", metadata=table(labels=TEXTS, annotations=TEXTS), spec=POD)
RAY_CLUSTER = table(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=table(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=table(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        securityContext=CONTAINER_SECURITY,
        resources=RESOURCES,
    ),
    headGroupSpec=table(
        "rayStartParams",
        "template",
        rayStartParams=TEXTS,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        template=TEMPLATE,
    ),
    workerGroupSpecs=rows(
        table(
            "groupName",
            "rayStartParams",
            "template",
            "minReplicas",
            "maxReplicas",
            groupName=NAME,
            maxReplicas=COUNT,
            minReplicas=COUNT,
            rayStartParams=TEXTS,
            replicas=COUNT,
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = table(
    "entrypoint",
    "clusterSelector",
    clusterSelector=table("ray.io/cluster", **{"ray.io/cluster": NAME}),
    entrypoint=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
)
NETWORK = table(
    "podSelector",
    "policyTypes",
    podSelector=SELECTOR,
    policyTypes=rows(one_of("Ingress", "Egress")),
    ingress=rows(
        table(
            **{
                "from": rows(table(podSelector=SELECTOR, namespaceSelector=SELECTOR)),
                "ports": rows(table("port", protocol=one_of("TCP", "UDP"), port=PORT)),
            }
        )
    ),
)


def document(version: str, kind: str, meta: Schema = META, **fields: Schema) -> Schema:
    return table("apiVersion", "kind", apiVersion=one_of(version), kind=one_of(kind), metadata=meta, **fields)


KINDS = {
    "Namespace": document("v1", "Namespace"),
    "ServiceAccount": document("v1", "ServiceAccount", automountServiceAccountToken=FLAG),
    "NetworkPolicy": document("networking.k8s.io/v1", "NetworkPolicy", spec=NETWORK),
    "RayCluster": document("ray.io/v1", "RayCluster", spec=RAY_CLUSTER),
    "RayJob": document("ray.io/v1", "RayJob", spec=RAY_JOB),
    "Kustomization": document("kustomize.config.k8s.io/v1beta1", "Kustomization", namespace=NAME, resources=rows(TEXT)),
}
