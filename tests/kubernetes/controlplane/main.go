// Controlplane runs the control plane of a Kubernetes cluster for tests; only the nodes are played.
//
//	controlplane FOLDER
//
// It starts etcd, kube-apiserver, kube-controller-manager and kube-scheduler on 127.0.0.1, keeps their files in FOLDER,
// and prints a line once pods can be created. It ends when its standard input is closed, and what it started ends with it.
//
// FOLDER gets a kubeconfig for each user (admin, and releaser, who has no rights but those that RBAC grants), audit.log, and
// a log for each process.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

// Of the controllers, those that releases meet.
const active = "daemonset-controller,deployment-controller,garbage-collector-controller,namespace-controller," +
	"replicaset-controller,resourcequota-controller,serviceaccount-controller,statefulset-controller"

// The user name of a token is the token. The components' own requests are not in the audit log.
const tokens = "components,components,1,system:masters\nadmin,admin,2,system:masters\nreleaser,releaser,3\n"

const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: None, users: [components]}
  - {level: Request, verbs: [create, update, patch, delete]}
  - {level: Metadata}
`

const kubeconfig = `apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: %[1]s}}]
clusters: [{name: test, cluster: {server: "%[2]s", certificate-authority: "%[3]s"}}]
users: [{name: %[1]s, user: {token: %[1]s}}]
`

func main() {
	if len(os.Args) < 2 {
		log.Fatal("usage: controlplane FOLDER")
	}
	os.Args = os.Args[1:]
	switch os.Args[0] {
	case "kube-apiserver":
		os.Exit(cli.Run(apiserver.NewAPIServerCommand()))
	case "kube-controller-manager":
		os.Exit(cli.Run(controllers.NewControllerManagerCommand()))
	case "kube-scheduler":
		os.Exit(cli.Run(scheduler.NewSchedulerCommand()))
	}
	runtime.LockOSThread() // a child gets its death signal when the thread that started it ends
	folder, err := filepath.Abs(os.Args[0])
	if err == nil {
		err = run(context.Background(), plane{folder, make(chan error)})
	}
	if err != nil {
		log.Fatal(err)
	}
}

// A plane is a control plane with its folder; ended receives what ends it.
type plane struct {
	folder string
	ended  chan error
}

func (p plane) path(name string) string { return filepath.Join(p.folder, name) }

func run(ctx context.Context, p plane) error {
	key, err := signingKey()
	if err != nil {
		return err
	}
	server := "https://" + freeAddress()
	files := map[string]string{"tokens.csv": tokens, "audit.yaml": auditPolicy, "accounts.key": key}
	for _, user := range []string{"components", "admin", "releaser"} {
		files[user+".kubeconfig"] = fmt.Sprintf(kubeconfig, user, server, p.path("apiserver.crt"))
	}
	for name, text := range files {
		if err := os.WriteFile(p.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	etcd, err := p.startEtcd()
	if err != nil {
		return err
	}
	err = p.start("kube-apiserver",
		"--etcd-servers=http://"+etcd, "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
		"--secure-port="+server[strings.LastIndex(server, ":")+1:],
		"--cert-dir="+p.folder, // where it puts a certificate that it signs itself
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24",
		"--token-auth-file="+p.path("tokens.csv"), "--authorization-mode=RBAC",
		"--disable-admission-plugins=TaintNodesByCondition", // nothing would remove the taint
		"--service-account-issuer="+server,
		"--service-account-key-file="+p.path("accounts.key"), "--service-account-signing-key-file="+p.path("accounts.key"),
		"--audit-policy-file="+p.path("audit.yaml"), "--audit-log-path="+p.path("audit.log"),
		"--kubelet-preferred-address-types=InternalIP")
	if err != nil {
		return err
	}
	config := p.path("components.kubeconfig")
	var client *kubernetes.Clientset
	err = p.until(func() (err error) {
		if client, err = connect(config); err == nil {
			_, err = client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		}
		return err
	})
	if err != nil {
		return err
	}
	common := []string{"--kubeconfig=" + config, "--leader-elect=false", "--secure-port=0"}
	if err := p.start("kube-controller-manager", append(common, "--controllers="+active,
		"--service-account-private-key-file="+p.path("accounts.key"))...); err != nil {
		return err
	}
	if err := p.start("kube-scheduler", common...); err != nil {
		return err
	}
	if err := playNodes(ctx, client); err != nil {
		return err
	}
	err = p.until(func() error { // without it, no pod is admitted
		_, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return err
	}
	fmt.Println("ready at", server)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		p.ended <- err
	}()
	return <-p.ended
}

// start starts a component as another process of this program.
func (p plane) start(component string, arguments ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	output, err := os.Create(p.path(component + ".log"))
	if err != nil {
		return err
	}
	command := exec.Command(self, append([]string{component}, arguments...)...)
	command.Stdout, command.Stderr = output, output
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := command.Start(); err != nil {
		return err
	}
	go func() { p.ended <- fmt.Errorf("%s ended, see %s: %v", component, output.Name(), command.Wait()) }()
	return nil
}

// startEtcd runs etcd in this process, and returns its address.
func (p plane) startEtcd() (string, error) {
	anywhere := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	config := embed.NewConfig()
	config.Dir, config.UnsafeNoFsync = p.path("etcd"), true
	config.LogLevel, config.LogOutputs = "error", []string{p.path("etcd.log")}
	config.ListenClientUrls, config.AdvertiseClientUrls = anywhere, anywhere
	config.ListenPeerUrls, config.AdvertisePeerUrls = anywhere, anywhere
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	etcd, err := embed.StartEtcd(config)
	if err != nil {
		return "", err
	}
	select {
	case <-etcd.Server.ReadyNotify():
		return etcd.Clients[0].Addr().String(), nil
	case err := <-etcd.Err():
		return "", err
	}
}

// until returns when try succeeds, or fails when a component ends or two minutes pass.
func (p plane) until(try func() error) error {
	limit := time.After(2 * time.Minute)
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case ended := <-p.ended:
			return ended
		case <-limit:
			return fmt.Errorf("not ready in two minutes: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func connect(kubeconfig string) (*kubernetes.Clientset, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS = -1 // unlimited
	return kubernetes.NewForConfig(config)
}

// signingKey returns a new key for the tokens of service accounts.
func signingKey() (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	encoded, err := x509.MarshalECPrivateKey(key)
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: encoded})), err
}

func freeAddress() string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
