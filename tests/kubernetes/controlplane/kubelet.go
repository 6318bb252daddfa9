package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	events "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
)

const (
	nodes   = 2
	tick    = 100 * time.Millisecond
	create  = 200 * time.Millisecond // from the node's assignment to the start of a container
	stop    = 200 * time.Millisecond // from a pod's deletion to its end
	backOff = 3 * time.Second        // between two starts of a container that crashes
)

// A plot says how a container fares. It is the tag of its image after the version, with seconds where they matter:
//
//	2              runs
//	2-slow-5       runs; its image takes 5 seconds to pull
//	2-unready      runs; its readiness probe fails
//	2-crash-5      crashes 5 seconds after each start (0.3 if not given)
//	2-oom-5        likewise, for want of memory
//	2-missing      its image does not exist
//	2-badname      its image has no valid name
//	2-config       its ConfigMap does not exist
//	2-mount        its volume cannot be mounted
type plot struct {
	image, word string
	seconds     time.Duration
	probed      bool
}

func plotOf(c corev1.Container) plot {
	p := plot{image: c.Image, seconds: 300 * time.Millisecond, probed: c.ReadinessProbe != nil}
	words := strings.Split(c.Image[strings.LastIndex(c.Image, ":")+1:], "-")
	if len(words) > 1 {
		p.word = words[1]
	}
	if len(words) > 2 {
		if n, err := strconv.ParseFloat(words[2], 64); err == nil {
			p.seconds = time.Duration(n * float64(time.Second))
		}
	}
	return p
}

// A scene is what a kubelet reports of a container at one moment; the event belongs to its beginning.
type scene struct {
	state, last    corev1.ContainerState
	ready          bool
	restarts       int32
	event, message string
}

// at returns the scene after the time that has passed since the pod began.
func (p plot) at(began time.Time, passed time.Duration) scene {
	start := create
	if p.word == "slow" {
		start += p.seconds
	}
	if passed < start {
		return waiting("ContainerCreating", "")
	}
	since := func(d time.Duration) metav1.Time { return metav1.NewTime(began.Add(d)) }
	switch p.word {
	case "missing":
		why := fmt.Sprintf("failed to pull image %q: not found", p.image)
		if passed < start+time.Second {
			return waiting("ErrImagePull", why).with("Failed", why)
		}
		why = fmt.Sprintf("Back-off pulling image %q: ErrImagePull: %s", p.image, why)
		return waiting("ImagePullBackOff", why).with("BackOff", why)
	case "badname":
		why := fmt.Sprintf("couldn't parse image name %q: invalid reference format", p.image)
		return waiting("InvalidImageName", why).with("InspectFailed", why)
	case "config":
		why := `configmap "settings" not found`
		return waiting("CreateContainerConfigError", why).with("Failed", "Error: "+why)
	case "mount":
		return waiting("ContainerCreating", "").with("FailedMount", `MountVolume.SetUp failed for volume "data"`)
	case "crash", "oom":
		round := p.seconds + backOff
		number := (passed - start) / round
		begin := start + number*round
		end := func(begin time.Duration) corev1.ContainerState {
			t := &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", StartedAt: since(begin), FinishedAt: since(begin + p.seconds)}
			if p.word == "oom" {
				t.ExitCode, t.Reason = 137, "OOMKilled"
			}
			return corev1.ContainerState{Terminated: t}
		}
		s := scene{restarts: int32(number)}
		if number > 0 {
			s.last = end(begin - round)
		}
		switch ran := passed - begin; {
		case ran < p.seconds:
			s.state.Running, s.ready = &corev1.ContainerStateRunning{StartedAt: since(begin)}, !p.probed
		case ran < p.seconds+backOff/6:
			s.state = end(begin)
		default:
			s.last = end(begin)
			s.state = waiting("CrashLoopBackOff", "back-off restarting failed container").state
			s = s.with("BackOff", "Back-off restarting failed container")
		}
		return s
	}
	s := scene{ready: p.word != "unready" || !p.probed}
	s.state.Running = &corev1.ContainerStateRunning{StartedAt: since(start)}
	if !s.ready {
		s = s.with("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503")
	}
	return s
}

func waiting(reason, message string) scene {
	return scene{state: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}
}

func (s scene) with(event, message string) scene {
	s.event, s.message = event, message
	return s
}

// A stage is the nodes of the cluster, with what happened to their pods.
type stage struct {
	client *kubernetes.Clientset
	pods   cache.Store
	events record.EventRecorder
	began  map[types.UID]time.Time
	dying  map[types.UID]time.Time
	told   map[string]string // the last event of each container
}

// playNodes creates the nodes, and plays their kubelets from then on.
func playNodes(ctx context.Context, client *kubernetes.Clientset) error {
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(&events.EventSinkImpl{Interface: client.CoreV1().Events("")})
	factory := informers.NewSharedInformerFactory(client, 0)
	s := stage{
		client: client,
		pods:   factory.Core().V1().Pods().Informer().GetStore(),
		events: broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kubelet"}),
		began:  map[types.UID]time.Time{},
		dying:  map[types.UID]time.Time{},
		told:   map[string]string{},
	}
	routes := http.NewServeMux()
	routes.HandleFunc("/containerLogs/{namespace}/{pod}/{container}", s.logs)
	server := httptest.NewTLSServer(routes)
	port, err := strconv.Atoi(server.URL[strings.LastIndex(server.URL, ":")+1:])
	if err != nil {
		return err
	}
	for number := range nodes {
		size := corev1.ResourceList{"cpu": resource.MustParse("64"), "memory": resource.MustParse("64Gi"), "pods": resource.MustParse("1000")}
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%d", number+1)}}
		node.Status.Capacity, node.Status.Allocatable = size, size
		node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}}
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "127.0.0.1"}}
		node.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(port)
		if _, err := client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	go func() {
		for now := range time.Tick(tick) {
			for _, each := range s.pods.List() {
				s.play(ctx, each.(*corev1.Pod), now)
			}
		}
	}()
	return nil
}

// play brings one pod up to date.
func (s stage) play(ctx context.Context, pod *corev1.Pod, now time.Time) {
	if pod.Spec.NodeName == "" {
		return
	}
	if pod.DeletionTimestamp != nil {
		if passed(s.dying, pod.UID, now) >= stop {
			options := metav1.NewDeleteOptions(0)
			options.Preconditions = metav1.NewUIDPreconditions(string(pod.UID))
			s.report("delete", s.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, *options))
		}
		return
	}
	age := passed(s.began, pod.UID, now)
	old, ready, started := pod.Status.ContainerStatuses, true, false
	pod = pod.DeepCopy()
	pod.Status.ContainerStatuses = nil
	changed := len(old) == 0
	for number, c := range pod.Spec.Containers {
		scene := plotOf(c).at(s.began[pod.UID], age)
		ready = ready && scene.ready
		started = started || scene.state.Running != nil || scene.last.Terminated != nil
		pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: c.Name, Image: c.Image, State: scene.state, LastTerminationState: scene.last, Ready: scene.ready, RestartCount: scene.restarts,
		})
		if len(old) > 0 && !alike(old[number], pod.Status.ContainerStatuses[number]) {
			changed = true
		}
		if key, event := string(pod.UID)+c.Name, scene.event; event != s.told[key] {
			if s.told[key] = event; event != "" {
				s.events.Event(pod, corev1.EventTypeWarning, event, scene.message)
			}
		}
	}
	if !changed {
		return
	}
	if pod.Status.StartTime == nil {
		pod.Status.StartTime = &metav1.Time{Time: now}
	}
	if started {
		pod.Status.Phase = corev1.PodRunning
	}
	for _, kind := range []corev1.PodConditionType{corev1.PodInitialized, corev1.ContainersReady, corev1.PodReady} {
		set(&pod.Status, kind, ready || kind == corev1.PodInitialized, now)
	}
	_, err := s.client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
	s.report("status", err)
}

// passed returns the time since a pod was first seen, as the map has it.
func passed(first map[types.UID]time.Time, pod types.UID, now time.Time) time.Duration {
	if _, seen := first[pod]; !seen {
		first[pod] = now
	}
	return now.Sub(first[pod])
}

// alike tells whether nothing but the moments differ between two statuses of a container.
func alike(a, b corev1.ContainerStatus) bool {
	reason := func(s corev1.ContainerState) string {
		switch {
		case s.Waiting != nil:
			return s.Waiting.Reason
		case s.Terminated != nil:
			return s.Terminated.Reason
		}
		return "Running"
	}
	return a.Ready == b.Ready && a.RestartCount == b.RestartCount && reason(a.State) == reason(b.State)
}

func set(status *corev1.PodStatus, kind corev1.PodConditionType, holds bool, now time.Time) {
	value, reason := corev1.ConditionFalse, "ContainersNotReady"
	if holds {
		value, reason = corev1.ConditionTrue, ""
	}
	condition := corev1.PodCondition{Type: kind, Status: value, Reason: reason, LastTransitionTime: metav1.NewTime(now)}
	index := slices.IndexFunc(status.Conditions, func(c corev1.PodCondition) bool { return c.Type == kind })
	if index < 0 {
		status.Conditions = append(status.Conditions, condition)
	} else if status.Conditions[index].Status != value {
		status.Conditions[index] = condition
	}
}

// report prints an error that the next tick does not undo by itself.
func (s stage) report(what string, err error) {
	if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		log.Println("kubelet:", what, err)
	}
}

// logs serves the output of a container, which tells of its end if it crashes.
func (s stage) logs(w http.ResponseWriter, r *http.Request) {
	found, exists, err := s.pods.GetByKey(r.PathValue("namespace") + "/" + r.PathValue("pod"))
	if err != nil || !exists {
		http.NotFound(w, r)
		return
	}
	for _, c := range found.(*corev1.Pod).Spec.Containers {
		if c.Name == r.PathValue("container") {
			lines := []string{"listening on :8080"}
			if plotOf(c).word == "crash" {
				lines = []string{"connecting to db:5432", "panic: connection refused"}
			}
			if n, err := strconv.Atoi(r.URL.Query().Get("tailLines")); err == nil && n < len(lines) {
				lines = lines[len(lines)-n:]
			}
			fmt.Fprintln(w, strings.Join(lines, "\n"))
		}
	}
}
